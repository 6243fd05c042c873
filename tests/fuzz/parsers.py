"""Every parser, by name."""

from __future__ import annotations

import importing
import keeping
import networks
import runtimes
import searching
import texts
from contract import Parser

PARSERS: dict[str, Parser] = {
    parser.name: parser
    for family in (texts, importing, keeping, networks, runtimes, searching)
    for parser in family.PARSERS
}
