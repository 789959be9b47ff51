"""Prompts that tokenizers disagree about: the same ones at every call."""

from __future__ import annotations

import numpy as np

_PIECES = [
    *(
        "the",
        "cat",
        "CAT'S",
        "and",
        "red-dog",
        "they'll",
        "3.14",
        "١٢",
        "naïve",
        "e\u0301",
        "İstanbul",
        "ß",
        "猫",
        "日本語",
    ),
    *(
        "😀",
        "👩‍👩‍👧",
        "🇩🇪",
        "\u200b",
        "\ufeff",
        "\t",
        "\n",
        "  ",
        "\x00",
        "\x7f",
        "�",
        "𝕏",
        "ﬁ",
        "<|endoftext|>",
        "<|startoftext|>",
    ),
    *("<|end", "</w>", "!", "...", "(a:1.2)", "'", '"', "\\", "Ω", "ไทย", "عربى", "עברית", "한국어", "a" * 40),
]


def odd_strings(number: int) -> list[str]:
    rng = np.random.default_rng(0)
    made = ["", " ", "\n\n", *_PIECES]
    while len(made) < number:
        glue = ["", " ", "  ", ","][rng.integers(4)]
        made.append(glue.join(_PIECES[i] for i in rng.integers(len(_PIECES), size=rng.integers(1, 9))))
    return made
