"""Type stubs of TensorRT-RTX's bindings, from the installed library. It ships none, and guesses would check nothing.

    python .ci/tensorrt_stubs.py build/stubs

mypy's own stubgen reads names and signatures off the library; what it writes is mended where it is no stub.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from mypy import stubgen

_BINDINGS = "tensorrt_rtx_bindings"
# A name of the library's for one of its dtypes, behind which no annotation could mean Python's.
_SHADOWS = re.compile(r"^bool: DataType\n", re.MULTILINE)
_SIGNATURE = re.compile(r"\(.*\) ->")


def write_stubs(folder: Path) -> None:
    """Write tensorrt_rtx and the package that holds its bindings into `folder`, the same bytes every time."""
    stubgen.main(["--quiet", "--inspect-mode", "--package", _BINDINGS, "--output", str(folder)])
    for path in sorted((folder / _BINDINGS).glob("*.pyi")):
        path.write_text(_mended(_SHADOWS.sub("", path.read_text())))
    package = folder / "tensorrt_rtx"
    package.mkdir(exist_ok=True)
    (package / "__init__.pyi").write_text(
        f"from {_BINDINGS} import *\nfrom {_BINDINGS} import __version__ as __version__\n"
    )


def _mended(stub: str) -> str:
    """The stub, where Python allows no such signature with one that takes anything."""
    lines = stub.splitlines(keepends=True)
    while True:
        try:
            ast.parse("".join(lines))
        except SyntaxError as error:
            wrong = (error.lineno or 1) - 1
            lines[wrong], changed = _SIGNATURE.subn("(self, *args: Any, **kwargs: Any) ->", lines[wrong], count=1)
            if not changed or lines[wrong] == error.text:
                raise
        else:
            return "".join(lines)


if __name__ == "__main__":
    write_stubs(Path(sys.argv[1]))
