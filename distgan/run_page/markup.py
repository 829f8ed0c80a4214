"""Turns texts and numbers of runs into HTML and JSON, in which they stay texts and numbers."""

import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

_LONGEST = 250  # characters of a text out of a run


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Iterable[int] = ()) -> str:
    """Returns a table whose first column heads its rows; `numbers` are the columns that are aligned to the right."""
    right = {i: ' class="number"' for i in numbers}
    head = "".join(f'<th scope="col"{right.get(i, "")}>{escaped(cell)}</th>' for i, cell in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row"{right.get(i, "")}>{escaped(cell)}</th>'
            if i == 0
            else f"<td{right.get(i, '')}>{escaped(cell)}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escaped(caption)}"><table>'
        f"<caption>{escaped(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def note(text: str, *, markup: bool = False) -> str:
    """Returns a paragraph in small print; with `markup` the text is HTML."""
    return f'<p class="note">{text if markup else escaped(text)}</p>'


def number(value: float | None) -> str:
    """Returns a number with five digits; nothing for None."""
    return "" if value is None else f"{value:.5g}" if math.isfinite(value) else "NaN or inf"


def cut(text: str) -> str:
    """Shortens a text that is too long."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def escaped(text: str) -> str:
    """Returns a text as HTML that shows it, also inside of an attribute's quotation marks."""
    return html.escape(text.encode(errors="replace").decode())  # a path may hold bytes that are no UTF-8


def as_json(value: Any) -> str:
    """Returns JSON that cannot end the element that it stands in."""
    return json.dumps(value).replace("<", "\\u003c")


def setting(value: Any) -> str:
    """Returns a value of a recipe or protocol as text."""
    if isinstance(value, str):
        return cut(value)
    return cut(json.dumps(value, ensure_ascii=False, default=str))
