"""Prompts as pieces of text with weights, in the syntax of AUTOMATIC1111's web interface.

(cat)       1.1 times the weight               (cat:1.3)        1.3 times
[cat]       divided by 1.1                     \\( \\) \\[ \\] \\\\   the characters themselves
BREAK       what follows begins a new chunk

Brackets nest and multiply. One that is not closed goes on to the end; one that closes nothing is text. Prompts that
change between steps, [cat:dog:0.5] and [cat|dog], are not read: they are text in brackets.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import InputError

# Pieces (text, weight) by section; each section begins a chunk of tokens of its own.
Sections = list[list[tuple[str, float]]]

_MARK: Final = re.compile(r"\\([\\()\[\]])|([(\[])|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|([)\]])")
_BREAK: Final = re.compile(r"\s*\bBREAK\b\s*")
_FACTORS: Final = {"(": 1.1, "[": 1 / 1.1}
_OPENED_BY: Final = {")": "(", "]": "["}
_DEEPEST, _LARGEST = 64, 1000.0


def plain_sections(prompt: str) -> Sections:
    return [[(prompt, 1.0)]]


def weighted_sections(prompt: str) -> Sections:
    """Raises InputError for weights or nested brackets that no prompt has."""
    texts, weights = [""], [1.0]
    opened: dict[str, list[int]] = {"(": [], "[": []}
    place = 0

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        weights[start:] = [weight * factor for weight in weights[start:]]
        begin()

    def begin() -> None:
        texts.append("")
        weights.append(1.0)

    for mark in _MARK.finditer(prompt):
        texts[-1] += prompt[place : mark.start()]
        place = mark.end()
        escaped, opening, weight, closing = mark.groups()
        bracket = "(" if weight else _OPENED_BY.get(closing or "", "")
        if opening:
            begin()
            opened[opening].append(len(texts) - 1)
        elif bracket and opened[bracket]:
            close(bracket, float(weight) if weight else _FACTORS[bracket])
        else:
            texts[-1] += escaped or mark[0]
        if sum(map(len, opened.values())) > _DEEPEST:
            raise _refused(f"brackets nested more than {_DEEPEST} deep", prompt)
    texts[-1] += prompt[place:]
    for bracket, starts in opened.items():
        while starts:
            close(bracket, _FACTORS[bracket])
    if not max(map(abs, weights)) <= _LARGEST:
        raise _refused(f"a weight above {_LARGEST:g}", prompt)
    return _sections([(text, weight) for text, weight in zip(texts, weights, strict=True) if text])


def _refused(what: str, prompt: str) -> InputError:
    return InputError(
        got=f"{what} in the prompt {prompt!r:.80}",
        expected="a few brackets, and weights of 0.5 to 1.5, such as ((cat)) and (cat:1.3)",
        remedy="shorten it, or leave prompt_syntax out",
    )


def _sections(pieces: list[tuple[str, float]]) -> Sections:
    """Neighbours of one weight are one text, as if there had been no brackets."""
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            merged[-1] = merged[-1][0] + text, weight
        else:
            merged.append((text, weight))
    found: Sections = [[]]
    for text, weight in merged:
        first, *others = _BREAK.split(text)
        found[-1].append((first, weight))
        found += [[(other, weight)] for other in others]
    return found


def weigh(embeds: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Embeddings `[N, L, D]` times the weights `[N, L]` of their tokens. The mean of each chunk stays what it was,
    unless it is 0 but for rounding."""
    plain = (weights == 1.0).all(axis=1)
    made = embeds * weights[:, :, None]
    before, after, size = (each.mean(axis=(1, 2), dtype=np.float64) for each in (embeds, made, np.abs(embeds)))
    kept = (np.minimum(np.abs(before), np.abs(after)) > 1e-5 * size) & ~plain
    scale = np.divide(before, after, out=np.ones_like(before), where=kept)[:, None, None]
    scaled: NDArray[np.float32] = made * scale.astype(np.float32)
    return scaled
