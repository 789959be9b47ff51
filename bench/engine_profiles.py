"""One TensorRT-RTX engine with a profile for each batch size, beside an engine for each size.

`python -m skipstep.bench.engine_profiles --out FILE`; kernels are read from the plan, without a GPU
(skipstep.export.engine_plan).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from skipstep.bench.models import open_subject
from skipstep.bench.record import environment, write_json
from skipstep.export.engine_plan import kernels
from skipstep.export.partition import partition
from skipstep.export.precision import lower_precision
from skipstep.export.tensorrt_engine import BuiltEngine, build_engine

MODELS = ("fashion-mnist", "cifar10-architecture")
# Of the network: requests of 1 and 16 samples, with guidance and without.
BATCH_SIZES = (1, 2, 16, 32)
_ARCHITECTURE = 89


def rows_of(name: str, precision: str, graph: bytes) -> list[list[str]]:
    def built(*sizes: int) -> BuiltEngine:
        return build_engine(graph, library="tensorrt_rtx", compute_capability=_ARCHITECTURE, batch_sizes=sizes)

    def row(form: str, engines: list[BuiltEngine]) -> list[str]:
        launched = [str(plan.total()) for each in engines for plan in kernels(each.engine)]
        size = sum(len(each.engine) for each in engines) / 1e6
        return [name, precision, form, ", ".join(launched), f"{size:.1f}", f"{sum(e.seconds for e in engines):.0f}"]

    return [
        row("an engine for each size", [built(size) for size in BATCH_SIZES]),
        row("one engine, a profile for each size", [built(*BATCH_SIZES)]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    rows = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            step = partition(open_subject(name, folder=Path(folder)).exported).graphs.step
        graphs = {"float32": step, "float16": lower_precision(step, "float16")}
        for precision, graph in graphs.items():
            for row in rows_of(name, precision, graph):
                print(*row, sep="  ", flush=True)
                rows.append(row)
    facts = environment()
    found = {
        "commit": facts["commit"],
        "command": f"python -m skipstep.bench.engine_profiles --out {options.out}",
        "header": ["network", "precision", "form", "kernels at each size", "MB", "seconds to build"],
        "rows": rows,
        "note": f"Batch sizes {', '.join(map(str, BATCH_SIZES))} for sm_{_ARCHITECTURE}. Counted, not run on a GPU.",
    }
    write_json(options.out, found)


if __name__ == "__main__":
    main()
