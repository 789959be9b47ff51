"""The benchmark as a process: its command, and a second measurement of one case with the run's own options."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from skipstep.bench.compare import Case, cases_of, read_run
from skipstep.bench.result_files import Absence, Entry
from skipstep.errors import InputError

# Three times the rounds bring the noise of a median down by √3.
MORE_ROUNDS = 3


def run_benchmark(options: Mapping[str, Any], *, out: Path | None, quiet: bool = False) -> int:
    """Run `pytest --pyargs skipstep.bench` with these options and write its JSON to `out`; pytest's exit status.

    `options` are those of skipstep.bench.plugin; lists are joined by commas, and `models` are given one by one.
    """
    command = [sys.executable, "-m", "pytest", "--pyargs", "skipstep.bench", "-rsf", "-q"]
    # The current folder's pytest settings are for other tests than these.
    command += ["-c", os.devnull, "--rootdir", os.getcwd(), "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["--benchmark-columns=median,min,max,rounds", "--benchmark-sort=mean"]
    for name, value in options.items():
        if name == "models":
            for model in value:
                command += ["--model", str(model)]
        elif value not in ((), [], None):
            text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            command += [f"--{name.replace('_', '-')}", text]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        command += [f"--benchmark-json={out}"]
    # A test suite that runs in several processes would otherwise disable benchmarks.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    output: Any = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, check=False, env=environment, stdout=output).returncode


def measuring_again(result: Path, *, progress: Callable[[str], None]) -> Callable[[Case], Case]:
    """What measures a case of `result` again with all its contenders, MORE_ROUNDS times as many rounds and as much
    time. Raises InputError where the result does not hold the options that it was measured with."""
    options = read_run(result).options
    if "models" not in options:
        raise InputError(
            got=f"{result} without the options that it was measured with",
            expected="a result that skipstep bench --out wrote",
            remedy="leave out --measure-again, or measure the result again",
        )

    def measure(case: Case) -> Case:
        from skipstep.bench.models import subject_name

        known: list[Entry | Absence] = [*case.entries.values(), *case.absent.values()]
        model, steps, batch_size = known[0].model, known[0].steps, known[0].batch_size
        rounds = max((len(each.data) for each in case.entries.values()), default=options["rounds"])
        paths = [each.partition("@")[0] for each in options["models"]]
        changes = {
            "models": [path for path in paths if subject_name(path) == model],
            "plans": [steps],
            "batch": [batch_size],
            "contenders": [each.contender for each in known],
            "measure": [],
            "budget": MORE_ROUNDS * options["budget"],
            "rounds": MORE_ROUNDS * rounds,
        }
        progress(f"measure again: {case.name}")
        with TemporaryDirectory(prefix="skipstep-again-") as folder:
            out = Path(folder) / "again.json"
            status = run_benchmark({**options, **changes}, out=out, quiet=True)
            if status not in (0, 1):
                raise InputError(
                    got=f"a second measurement that pytest ended with status {status}",
                    expected="the same models and contenders as in the result, at the same paths",
                    remedy="compare in the folder where skipstep bench ran",
                )
            # Without a single number there is no file, and the first measurement stands.
            return cases_of(read_run(out))[case.name] if out.exists() else case

    return measure
