"""The most memory that a process holds which draws samples once: `python -m skipstep.bench.peak_memory`, a child each.

What counts is the whole process, imports, weights and compilation included, as the operating system says. A contender
that runs a bundle or an exported file where it is deployed is measured so: the export happened elsewhere.

The number is VmHWM of /proc, which begins with the program: getrusage's ru_maxrss begins with the parent's memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_TIMEOUT_SECONDS = 300.0
# Their process would hold torch and an exporter that no deployment of them holds.
NEEDS_EXPORT = ("onnxruntime-stepwise-python", "openvino", "skipstep-onnx-stepwise")


def peak_memory(model: str, contender: str, *, steps: int, batch_size: int, threads: int) -> int:
    """Bytes, in a fresh process. Raises RuntimeError with what the process said where it failed."""
    command = [sys.executable, "-m", "skipstep.bench.peak_memory", "--model", model, "--contender", contender]
    command += ["--steps", str(steps), "--batch", str(batch_size), "--threads", str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"took longer than {_TIMEOUT_SECONDS:g} s") from error
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:300])
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])


def _draw_from_bundle(options: argparse.Namespace) -> None:
    """What a product does; neither torch nor the benchmark's own modules are imported."""
    import numpy as np

    from skipstep import load

    engine = load(options.model, num_threads=options.threads, allow_hard_links=True)
    network = engine.network
    arguments: dict[str, Any] = {} if network.num_classes is None else {"class_labels": [0] * options.batch}
    if network.prompt_shape is not None:
        arguments["prompt_embeds"] = np.zeros((options.batch, *network.prompt_shape), np.float32)
    plan = next(plan for plan in engine.plans.values() if plan.steps == options.steps)
    engine.sample(plan=plan, seeds=list(range(options.batch)), **arguments)


def _draw(options: argparse.Namespace) -> None:
    import torch

    from skipstep.bench.contenders import CONTENDERS
    from skipstep.bench.contenders.workload import Setup, Workload
    from skipstep.bench.models import open_subject

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        subject = open_subject(options.model, folder=Path(folder))
        plan = subject.plan(options.steps)
        built = CONTENDERS[options.contender].build(subject, Setup((plan,), (options.batch,), threads=options.threads))
        built.prepare(Workload(subject, plan, options.batch))()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model's name, folder or bundle")
    parser.add_argument("--contender", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if Path(options.model, "manifest.json").is_file():
        _draw_from_bundle(options)
    else:
        _draw(options)
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise SystemExit("this system's /proc says nothing of peak memory")
    print(json.dumps({"peak_bytes": int(found[1]) * 1024}))


if __name__ == "__main__":
    main()
