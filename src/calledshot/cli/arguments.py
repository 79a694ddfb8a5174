"""Arguments that several verbs share, and how they print.

A verb that takes a recipe is `def verb(recipe: RecipeName, /, *overrides: Override, json: bool = False)` and hands both
to `load_recipe(recipe, overrides)`: what cyclopts does not know as the verb's own option is left for the recipe.
"""

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import Parameter

RecipeName = Annotated[str, Parameter(help="A preset (`shot recipe list`) or a TOML file.")]
Override = Annotated[
    str,
    Parameter(
        help="Keys of the recipe: `model.layers=8`, `--model.layers 8` or `--model.layers=8`.",
        allow_leading_hyphen=True,
    ),
]
Json = Annotated[bool, Parameter(help="Print JSON.", negative=())]


def print_json(value: Any) -> None:
    """One JSON document on stdout; numbers that JSON lacks are refused."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False, allow_nan=False)
    print()


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), prefix: str = "") -> str:
    """Rows aligned in columns, two spaces apart, those numbered in `right` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if place in right else cell.ljust(w)
            for place, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((prefix + "  ".join(cells)).rstrip())
    return "\n".join(lines)
