"""Compiles GroupNorms for one architecture: `python compile_norms.py 90` prints the facts of each kernel as JSON.

In a process of its own: the suite has loaded Triton's interpreter, with which nothing can be compiled.
"""

import itertools
import json
import sys
from dataclasses import asdict

from norm_inspection import NORMS, NormCase, inspect_norm


def facts(arch: int):
    for name, dtype, last, added in itertools.product(NORMS, ("fp16", "fp32"), (False, True), ("vector", "image")):
        # Without a value for each channel all that is read and written are whole operands.
        case = NormCase(*NORMS[name], dtype, last, added, affine=added == "vector")
        for place, found in enumerate(inspect_norm(arch, name, case)):
            yield asdict(case) | asdict(case.launch) | asdict(found) | {"first": case.launch.tiles > 1 and place == 0}


if __name__ == "__main__":
    print(json.dumps(list(facts(int(sys.argv[1])))))
