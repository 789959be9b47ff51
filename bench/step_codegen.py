"""What the step kernel compiles to, for every architecture: `python -m skipstep.bench.step_codegen --out FILE`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from skipstep.bench.record import write_json
from skipstep.export.cubins import ARCHITECTURES, DTYPES, VARIANTS, inspect_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), metavar="SM")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    facts = [inspect_step(arch, variant, dtype) for arch in options.arch for variant in VARIANTS for dtype in DTYPES]
    write_json(options.out, {"kernels": [asdict(fact) for fact in facts]})


if __name__ == "__main__":
    main()
