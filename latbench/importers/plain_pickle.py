"""Pickles of plain data: dicts, lists, tuples, strings and numbers. Anything else is refused by name; nothing is run.

The opcodes are read with ``pickletools`` and carried out here, not by ``pickle``: there is no name to look up and no
call to make (an ``OrderedDict`` becomes a dict), room is made for what the file holds only, and dict keys are text and
numbers, so nothing nested is ever hashed.
"""

from __future__ import annotations

import pickletools
import warnings
from typing import Any

from latbench.errors import TableError

MAX_BYTES = 4 * 2**20  # the largest known table of this kind is 0.5 MB; a byte can be a list of 64 in memory

_ORDERED_DICT = "collections OrderedDict"
_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"),
    )
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_CLASS = object()  # stands for collections.OrderedDict


class _RefusedError(Exception):
    """Something other than plain data."""


def loads(data: bytes, name: str) -> Any:
    """The value. Raises TableError, naming `name`, where it is no plain data, damaged or cut off."""
    if len(data) > MAX_BYTES:
        raise TableError(f"{name} is larger than {MAX_BYTES >> 20} MiB: refused as a pickle")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python's, on odd escapes in a STRING
            return _run(data)
    except _RefusedError as error:
        raise TableError(f"{name} is refused: {error}, and only plain containers and numbers are read") from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # a stack that does not fit its opcodes
        why = " ".join(str(error).split())
        raise TableError(f"{name} is no pickle, or it is damaged or cut off: {why}") from None


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, position in pickletools.genops(data):
        name = opcode.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if argument is None else int(argument)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument or 0)])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_class(str(argument) if name == "GLOBAL" else " ".join((stack.pop(-2), stack.pop()))))
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            _build(name, stack, position)
    raise ValueError("it has no end")


def _build(name: str, stack: list[Any], position: int | None) -> None:
    """The opcodes that make and fill containers."""
    if name == "EMPTY_DICT":
        stack.append({})
    elif name == "EMPTY_LIST":
        stack.append([])
    elif name == "EMPTY_TUPLE":
        stack.append(())
    elif name in _TUPLES:
        n = _TUPLES[name]
        stack[-n:] = [tuple(stack[-n:])]
    elif name == "TUPLE":
        stack.append(tuple(_to_mark(stack)))
    elif name == "LIST":
        stack.append(_to_mark(stack))
    elif name == "DICT":
        items = _to_mark(stack)
        stack.append(_filled({}, items))
    elif name == "APPEND":
        value = stack.pop()
        stack[-1].append(value)
    elif name == "APPENDS":
        items = _to_mark(stack)
        stack[-1].extend(items)
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _filled(stack[-1], [key, value])
    elif name == "SETITEMS":
        items = _to_mark(stack)
        _filled(stack[-1], items)
    elif name == "REDUCE":
        arguments, called = stack.pop(), stack.pop()
        stack.append(_ordered_dict(called, arguments))
    else:
        raise _RefusedError(f"it holds {name} at byte {position}")


def _class(text: str) -> object:
    if text != _ORDERED_DICT:
        raise _RefusedError(f"it refers to {text.replace(' ', '.')}")
    return _CLASS


def _ordered_dict(called: Any, arguments: Any) -> dict[Any, Any]:
    """``OrderedDict()``, or as Python 2 wrote it ``OrderedDict([[key, value], ...])``."""
    if called is not _CLASS or not isinstance(arguments, tuple) or len(arguments) > 1:
        raise _RefusedError("it calls something else than OrderedDict")
    return _filled({}, [part for key, value in (arguments[0] if arguments else ()) for part in (key, value)])


def _filled(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    """`target` with key, value, key, value, ... added."""
    if not isinstance(target, dict):
        raise ValueError("items are set on what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float):
            raise _RefusedError(f"a key of a dict is a {type(key).__name__}")
        if key in target:
            raise _RefusedError(f"a dict holds {str(key)[:80]!r} twice")
        target[key] = value
    return target


def _to_mark(stack: list[Any]) -> list[Any]:
    """What lies above the last mark; both are taken off."""
    at = len(stack) - 1
    while stack[at] is not _MARK:  # runs into IndexError where there is none
        at -= 1
    items = stack[at + 1 :]
    del stack[at:]
    return items
