"""Draw a picture with a plan's tables, its step network, NumPy and ONNX Runtime: nothing else is needed.

python loop.py step_b2_float32.onnx plan_10-KEY --label 3 --guidance 2      (b2: with and without the label)
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("network")
parser.add_argument("plan", type=Path)
parser.add_argument("--label", type=int, default=0)
parser.add_argument("--guidance", type=float, help="classifier-free guidance; the table's last row is the null label")
parser.add_argument("--out", default="x_0.npy")
given = parser.parse_args()

step = onnxruntime.InferenceSession(given.network, providers=["CPUExecutionProvider"])
coefficients, x, noise = (np.load(given.plan / f"{name}.npy") for name in ("coefficients", "x_T", "noise"))
tables = {path.stem: np.load(path) for path in (given.plan / "inputs").glob("*.npy")}  # [E, labels or 1, ...]
size, halves = step.get_inputs()[0].shape[0], 1 if given.guidance is None else 2
labels = np.repeat([given.label, -1][:halves], size // halves)
x = np.repeat(x, size // halves, axis=0)
history = [np.zeros_like(x)] * 3
for stage, c in enumerate(coefficients):  # The columns of c: skipstep.kernels.layout.
    inputs = {name: table[stage][labels if table.shape[1] > 1 else 0 * labels] for name, table in tables.items()}
    out = step.run(None, {"sample": np.concatenate([x] * halves), **inputs})[0][:, : x.shape[1]]
    if given.guidance is not None:
        out = out[len(x) :] + np.float32(given.guidance) * (out[: len(x)] - out[len(x) :])
    x0, eps = c[0] * x + c[1] * out, c[2] * x + c[3] * out
    x0 = np.clip(x0, -c[4], c[4]) if c[4] else x0
    eps = c[5] * x + c[6] * x0 if c[5] or c[6] else eps
    after = c[7] * x0 + c[8] * eps + c[9] * x + c[16] * noise[stage]
    after += c[11] * history[0] + c[10] * history[1] + c[19] * history[2]
    if slot := int(c[31]):  # Counted from 1: the place in the solver's history that this evaluation writes.
        history[slot - 1] = c[12] * x + c[13] * x0 + c[14] * eps + c[15] * history[slot - 1]
    x = after
np.save(given.out, x)
