"""How large an ONNX model may be, told from its bytes: before protobuf makes objects of them, or onnx copies of them.

An empty node is 2 bytes in a file and 200 in memory; a function that calls another one twice, which calls another one
twice, is a million nodes after 20 such. Neither needs to be built to be counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor  # type: ignore[import-untyped]
from onnx import FunctionProto, GraphProto, ModelProto

from latbench.errors import ModelError
from latbench.graph.onnx_proto import subgraphs

MAX_FIELDS = 1_500_000  # entries of all messages: 3 s to count; a transformer of 20,000 nodes has 300,000
MAX_NODES = 100_000  # functions inlined: shapes are inferred one by one, 8 s for so many
MAX_DEPTH = 100  # of messages within messages, 33 branches or loops: protobuf's own limit
MAX_PACKED = 2**28  # numbers written in a byte or more each, 8 in memory: 2 GiB


def check_bytes(data: bytes, source: str) -> None:
    """Raises ModelError where a serialised model holds too much; what is malformed is left to protobuf to say."""
    n_fields = n_packed = 0
    stack = [(0, len(data), ModelProto.DESCRIPTOR)]
    while stack:
        if len(stack) > MAX_DEPTH:
            raise ModelError(f"{source} nests messages deeper than {MAX_DEPTH}: branches within branches without end")
        at, end, message = stack.pop()
        known = _fields(message)
        while at < end:
            n_fields += 1
            if n_fields > MAX_FIELDS:
                raise ModelError(f"{source} has more than {MAX_FIELDS} entries: no network has")
            try:
                number, wire, start, at = _entry(data, at, end)
            except ValueError:
                return
            inner = known.get(number)
            if wire == 2 and inner is not None:
                stack += [(at, end, message), (start, at, inner)]
                break
            if wire == 2 and number in _packed(message):
                n_packed += at - start
                if n_packed > MAX_PACKED:
                    raise ModelError(f"{source} holds more than {MAX_PACKED} numbers outside raw data")


def check_functions(model: ModelProto, source: str) -> None:
    """Raises ModelError where inlining its functions would not end, or gives too many nodes."""
    functions = {(f.domain, f.name): f for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}
    entered: set[tuple[str, str]] = set()
    for root in functions:
        stack = [root]
        while stack:
            key = stack[-1]
            if key in sizes:
                stack.pop()
                entered.discard(key)
                continue
            calls = [called for called in _called(functions[key]) if called in functions]
            waiting = [called for called in calls if called not in sizes]
            if not waiting:
                size = 1 + sum(1 for _ in _called(functions[key])) + sum(sizes[called] for called in calls)
                sizes[key] = min(size, MAX_NODES + 1)
            elif key in entered:
                raise ModelError(f"{source}: its function {key[1]!r} calls itself")
            else:
                entered.add(key)
                stack += waiting
    n = sum(sizes.get(called, 1) for called in _called(model.graph))
    if n > MAX_NODES:
        raise ModelError(f"{source} has more than {MAX_NODES} nodes: no network that is measured in one piece has")


def _called(part: GraphProto | FunctionProto) -> Iterator[tuple[str, str]]:
    """(domain, operator) of every node, those of subgraphs included."""
    graphs: list[Any] = [part]
    while graphs:
        for node in graphs.pop().node:
            yield node.domain, node.op_type
            graphs += subgraphs(node)


def _entry(data: bytes, at: int, end: int) -> tuple[int, int, int, int]:
    """Field number, wire type, start and end of the value at a position. Raises ValueError where it is malformed."""
    tag, at = _varint(data, at, end)
    number, wire = tag >> 3, tag & 7
    if wire == 0:
        _, stop = _varint(data, at, end)
    elif wire in (1, 5):
        stop = at + (8 if wire == 1 else 4)
    elif wire == 2:
        length, at = _varint(data, at, end)
        stop = at + length
    else:  # groups: ONNX has none
        raise ValueError
    if stop > end:
        raise ValueError
    return number, wire, at, stop


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError


@cache
def _fields(message: Descriptor) -> dict[int, Descriptor]:
    """Field number -> the messages that it holds."""
    return {field.number: field.message_type for field in message.fields if field.message_type is not None}


@cache
def _packed(message: Descriptor) -> frozenset[int]:
    """Fields of numbers that take a byte or more each."""
    kinds = {FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64}
    return frozenset(field.number for field in message.fields if field.cpp_type in kinds)
