"""What a field means stands behind it as a comment; the reference shows it as the field's docstring."""

from __future__ import annotations

import io
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Gives attributes without a docstring the comment that ends their line."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring is None and attr.endlineno is not None and isinstance(attr.filepath, Path):
            text = _comments(attr.filepath).get(attr.endlineno)
            if text and not text.startswith(("noqa", "type:", "fmt:")):
                attr.docstring = griffe.Docstring(text, lineno=attr.endlineno, parent=attr)


@cache
def _comments(path: Path) -> dict[int, str]:
    """Line -> the comment that stands there."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
