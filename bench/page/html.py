"""Markup in which nothing is trusted: text becomes HTML only by being escaped.

A child of an element is either Html, which `element` and its kin made, or text, which is escaped. Names in results come
from whoever wrote the file, so there is no other way to put one on a page.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

_VOID = ("meta", "br", "hr")
_TAG = re.compile(r"[a-z][a-z0-9]*")
# Directions that a name sets would go on after it and turn the rest of the line around.
_INVISIBLE = ("Cc", "Cs", "Co", "Cn")
_DIRECTIONS = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C, 0xFEFF)))


class Html(str):
    """Markup that needs no escaping."""

    __slots__ = ()


def plain(text: object) -> str:
    """Text with what cannot be shown, or would change how its surroundings are shown, replaced by U+FFFD."""
    return "".join(
        "\ufffd" if (unicodedata.category(c) in _INVISIBLE and c not in "\n\t") or c in _DIRECTIONS else c
        for c in str(text)
    )


def escaped(child: object) -> str:
    return child if isinstance(child, Html) else html.escape(plain(child), quote=True)


def element(tag: str, *children: object, **attributes: object) -> Html:
    """An element. Attribute names take `_` for `-` and may end in `_` (`class_`); True is a bare one, None is none."""
    assert _TAG.fullmatch(tag), "tags are written here, not read"
    parts = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        key = name.rstrip("_").replace("_", "-")
        parts.append(f" {key}" if value is True else f' {key}="{escaped(value)}"')
    start = f"<{tag}{''.join(parts)}>"
    return Html(start if tag in _VOID else f"{start}{''.join(map(escaped, children))}</{tag}>")


def prose(text: str) -> Html:
    """A sentence in which what stands between backticks is code."""
    parts = text.split("`")
    return join(element("code", part) if number % 2 else part for number, part in enumerate(parts))


def join(children: Iterable[object], between: object = "") -> Html:
    return Html(escaped(between).join(map(escaped, children)))


def table(
    header: Sequence[object],
    rows: Sequence[Sequence[object]],
    *,
    label: str,
    marked: Iterable[int] = (),
) -> Html:
    """A table that scrolls in a box of its own where it is wider than the page. The first cell of a row names the row.

    Columns whose cells are numbers stand to the right. `marked` are the rows to stand out. A header without a word is
    left out.
    """
    numeric = [bool(rows) and all(_is_number(row[column]) for row in rows) for column in range(len(header))]
    classes = ["n" if each else None for each in numeric]
    head = element("tr", *(element("th", h, scope="col", class_=c) for h, c in zip(header, classes, strict=True)))
    wanted = set(marked)
    body = [
        element(
            "tr",
            element("th", row[0], scope="row", class_=classes[0]),
            *(element("td", cell, class_=c) for cell, c in zip(row[1:], classes[1:], strict=True)),
            class_="marked" if number in wanted else None,
        )
        for number, row in enumerate(rows)
    ]
    named = any(str(each) for each in header)
    whole = element("table", element("thead", head) if named else "", element("tbody", *body))
    # Whoever has no pointer must be able to reach the box to scroll it.
    return element("div", whole, class_="scroll", role="region", aria_label=label, tabindex="0")


def _is_number(cell: object) -> bool:
    return re.fullmatch(r"–?|≈? ?[+-]?[0-9][0-9,.]*(e[+-]?[0-9]+)? ?(%|×|ms)?", str(cell)) is not None
