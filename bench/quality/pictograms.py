"""Pictograms with names: Noto Emoji (Google, Apache-2.0) in its present and its first drawing, on white at 32x32.

`make pictograms-data` fetches the npm packages and draws them into one file:
`python -m skipstep.bench.quality.pictograms --packages node_modules --out pictograms.npz`. Left out is what a name of a
few words does not tell apart at this size: skin tones, one picture a gender, families, clock faces, Japanese buttons.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import MissingDependencyError, ModelFormatError, optional_package
from skipstep.storage.atomic import atomic_write

SETS: Final = ("noto", "noto-v1")
SIDE: Final = 32
DEFAULT_FILE: Final = Path("build/pictograms/pictograms.npz")
_LEFT_OUT: Final = re.compile(
    r"skin-tone|-tone\d|^((wo)?m[ae]n|family|couple|kiss|people)-|-(oclock|thirty)$|^japanese-.*-button$"
)
_COMMON: Final = ("Animals & Nature", "Food & Drink", "Objects", "Activities", "Travel & Places", "Smileys & Emotion")
_REMEDY: Final = "run `make pictograms-data`"


@dataclass(frozen=True, slots=True)
class Pictograms:
    """Pictures uint8 `[N, 3, 32, 32]`, the name of each, and its category in the set that it is from."""

    pictures: NDArray[np.uint8]
    names: tuple[str, ...]
    categories: tuple[str, ...]

    def distinct(self) -> list[str]:
        return sorted(set(self.names))

    def common(self, count: int = 200) -> list[str]:
        """Names to ask for: of one or two words, in both sets, of things and faces; evenly from those in order."""
        seen = [
            name
            for name, category in zip(self.names, self.categories, strict=True)
            if category in _COMMON and len(name.split()) <= 2
        ]
        both = sorted({name for name in seen if seen.count(name) == len(SETS)})
        return [both[i] for i in np.linspace(0, len(both) - 1, min(count, len(both))).round().astype(int)]


def load_pictograms(path: Path = DEFAULT_FILE) -> Pictograms:
    """Raises MissingDependencyError, ModelFormatError."""
    try:
        with np.load(path, allow_pickle=False) as file:
            pictures, names, categories = file["pictures"], file["names"].tolist(), file["categories"].tolist()
    except FileNotFoundError as error:
        raise MissingDependencyError(got=f"no file {path}", expected="the pictograms", remedy=_REMEDY) from error
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ModelFormatError(got=f"{path} ({error})", expected="what this module wrote", remedy=_REMEDY) from error
    return Pictograms(pictures, tuple(names), tuple(categories))


def draw(packages: Path) -> Pictograms:
    """All pictures of the packages `@iconify-json/noto` and `noto-v1`. Raises MissingDependencyError."""
    resvg = optional_package("resvg_py", use="draws SVG", remedy=_REMEDY)
    from PIL import Image

    pictures, names, categories = [], [], []
    for each in SETS:
        folder = packages / "@iconify-json" / each
        if not folder.is_dir():
            raise MissingDependencyError(got=f"no folder {folder}", expected="the npm package", remedy=_REMEDY)
        contents = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        known = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))["categories"]
        category = {name: kind for kind, members in known.items() for name in members}
        width, height = contents["width"], contents["height"]
        for name, icon in sorted(contents["icons"].items()):
            if icon.get("hidden") or _LEFT_OUT.search(name):
                continue
            svg = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
            )
            png = resvg.svg_to_bytes(
                svg_string=svg, width=SIDE, height=SIDE, background="#ffffff", skip_system_fonts=True
            )
            pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))
            pictures.append(pixels.transpose(2, 0, 1))
            names.append(name.replace("-", " "))
            categories.append(category.get(name, ""))
    return Pictograms(np.stack(pictures), tuple(names), tuple(categories))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="the folder node_modules")
    parser.add_argument("--out", type=Path, default=DEFAULT_FILE)
    options = parser.parse_args()
    made, file = draw(options.packages), io.BytesIO()
    np.savez_compressed(file, pictures=made.pictures, names=made.names, categories=made.categories)
    atomic_write(options.out, file.getvalue())
    print(f"{len(made.names)} pictures of {len(made.distinct())} names")


if __name__ == "__main__":
    main()
