"""What methods can do on each class of diffusers: the facts as a table for people (`docs/models.md`)."""

from __future__ import annotations

from dataclasses import dataclass

from ditkit.seams.anatomy import Anatomy, Seam
from ditkit.seams.facts import FACTS, UNSUPPORTED

_TEXT = {
    "prefix": "first in the sequence",
    "suffix": "last in the sequence",
    "cross": "beside it",
    "none": "none",
}

_SEAMS: dict[Seam, str] = {
    "stack": "skip the blocks",
    "units": "replace parts of a block",
    "tokens": "leave tokens out",
    "attention": "attention",
}
_PAGE = """# Classes of diffusers

Methods run on {count} classes. Caches *skip the blocks*, and supply the last one's output, or *replace
parts of a block*; token methods *leave tokens out*; sparse *attention* takes the place of the dense one.
A number names the reason that a method gets when it asks for what a class does not allow. A call may be
refused, too, with a reason of its own: reference pictures beside the one that is drawn, residuals of a
ControlNet, prompts of several lengths in a batch.

This page is written by `scripts/render_models.py` from `src/ditkit/seams/facts/`;
`ditkit models --classes` shows it in short.

{table}

{reasons}

## Not supported

`ditkit.apply` refuses these with the reason given here.

{refused}
"""


@dataclass(frozen=True)
class Row:
    """One class.

    Args:
        name: of the class.
        blocks: paths of the block lists.
        text: where the text stands.
        refused: seam -> the reason a method that needs it gets.
    """

    name: str
    blocks: tuple[str, ...]
    text: str
    refused: dict[Seam, str]

    def allows(self, seam: Seam) -> bool:
        """Can a method use this seam of the class?"""
        return seam not in self.refused


def rows() -> list[Row]:
    """Every class with facts, by name."""
    return [_row(FACTS[name]) for name in sorted(FACTS)]


def _row(anatomy: Anatomy) -> Row:
    blocks = tuple(stack.path for stack in anatomy.stacks)
    return Row(anatomy.name, blocks, _TEXT[anatomy.text], dict(anatomy.unfit))


def markdown() -> str:
    """The page `docs/models.md`."""
    notes: dict[str, int] = {}

    def cell(row: Row, seam: Seam) -> str:
        if row.allows(seam):
            return "yes"
        number = notes.setdefault(row.refused[seam], len(notes) + 1)
        return f"no ({number})"

    table = [_line("class", "blocks", "text", *_SEAMS.values()), _line(*["---"] * (3 + len(_SEAMS)))]
    for row in rows():
        paths = ", ".join(f"`{path}`" for path in row.blocks)
        table.append(_line(row.name, paths, row.text, *(cell(row, seam) for seam in _SEAMS)))
    reasons = [f"{number}. {reason[0].upper()}{reason[1:]}." for reason, number in notes.items()]
    refused = [_line("class", "reason"), _line("---", "---")]
    refused += [_line(name, UNSUPPORTED[name]) for name in sorted(UNSUPPORTED)]
    return _PAGE.format(
        count=len(FACTS), table="\n".join(table), reasons="\n".join(reasons), refused="\n".join(refused)
    )


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
