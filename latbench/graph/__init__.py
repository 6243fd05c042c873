"""The graph IR and its lowerings to ONNX and torch."""
