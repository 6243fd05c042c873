"""torch modules as ONNX bytes, batch normalisations left in: latbench folds them itself, and reports it."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from latbench.errors import EnvironmentUnfitError, ModelError, UsageError

if TYPE_CHECKING:
    from torch import nn

_OPSET = 17  # what TensorRT 8.6 reads; newer runtimes read it too


def from_module(module: nn.Module, input_shape: tuple[int, ...]) -> bytes:
    """`module` in eval mode as a serialised ONNX model with one static input, in the type of its parameters.

    Raises ModelError, with torch's own words, where the module does not run on that shape or cannot be exported.
    """
    import torch

    first = next(module.parameters(), torch.zeros(()))
    example = torch.zeros(input_shape, dtype=first.dtype, device=first.device)
    file = io.BytesIO()
    options: dict[str, Any] = {
        "f": file,
        "input_names": ["input"],
        "opset_version": _OPSET,
        "training": torch.onnx.TrainingMode.PRESERVE,  # EVAL lets some versions fold behind our back
        "do_constant_folding": False,
    }
    if "dynamo" in inspect.signature(torch.onnx.export).parameters:
        # The TorchScript exporter, the only one until torch 2.5: 14 ms a block where the dynamo exporter takes 480,
        # and without onnxscript.
        options["dynamo"] = False
    with _eval_mode(module), warnings.catch_warnings():
        # That this exporter is old, and that tracing fixes branches: right here, where every shape is static.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(module, (example,), **options)
        except (RuntimeError, ValueError, AssertionError) as error:
            words = " ".join(str(error).split())[:300]
            shape = "x".join(map(str, input_shape))
            raise ModelError(f"torch cannot export {type(module).__name__} at {shape}: {words}") from error
    return file.getvalue()


def from_torchvision(name: str, resolution: int = 224, *, batch: int = 1, seed: int = 0) -> bytes:
    """A torchvision classification model with random weights from `seed`, as `from_module` gives it.

    Raises UsageError on an unknown name, EnvironmentUnfitError without torch or torchvision.
    """
    try:
        import torch
        from torchvision import models
    except ImportError as error:
        raise EnvironmentUnfitError(
            f"torchvision:{name} needs torch and torchvision ({error}): pip install 'latbench[search]'"
        ) from None
    names = models.list_models(module=models)
    if name not in names:
        near = get_close_matches(name, names, 3, 0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"it has {', '.join(names)}"
        raise UsageError(f"torchvision has no classification model {name!r}: {hint}")
    if resolution < 1 or batch < 1:
        raise UsageError(f"resolution {resolution} and batch {batch} must be at least 1")
    # Vision transformers hold one position embedding per patch: their resolution is an argument.
    size = {"image_size": resolution} if name.startswith("vit_") else {}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # GoogLeNet's and Inception's slow initialisation
        torch.manual_seed(seed)
        module = models.get_model(name, weights=None, **size)
    return from_module(module, (batch, 3, resolution, resolution))


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True
