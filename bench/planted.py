"""Evidence for the regression gate: does it catch a slowdown of 15 %, and is it quiet where nothing changed?

    python -m skipstep.bench.planted --out bench/results/planted-slowdown.json

One process measures a baseline. Ten more processes then each measure two runs and hold them against it: one as it is,
one in which every call of our engine is followed by 15 % of its median time of busy work. Processes are fresh because
they differ from each other by more than the turns within one do. What looks slow is measured again with more turns, as
the gate does; here that happens in the process that found it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

from skipstep.bench.compare import LIMIT, Comparison, compare_runs
from skipstep.bench.record import environment, write_json
from skipstep.bench.results import Case, Contender, Run
from skipstep.bench.timing import take_turns
from skipstep.errors import InputError

SLOWDOWN: Final = 0.15
STEPS: Final = (1, 10)
ROUNDS: Final = 5
MORE_TURNS: Final = 3
ENGINE: Final = "skipstep-onnx"
# A turn runs the network at least this often, so that waking threads weigh little beside the calls themselves.
_NETWORK_RUNS: Final = 10


class Trial:
    """The textbook loop and our engine with the shipped model at batch 1, built once in this process."""

    def __init__(self, steps: Sequence[int] = STEPS) -> None:
        import torch

        from skipstep.bench.contenders.engines import ONNX
        from skipstep.bench.contenders.textbook import TEXTBOOK
        from skipstep.bench.contenders.workload import Setup, Workload
        from skipstep.bench.models import open_subject

        subject = open_subject("fashion-mnist", folder=Path())
        plans = tuple(map(subject.plan, steps))
        self.threads = torch.get_num_threads()
        setup = Setup(plans=plans, batch_sizes=(1,), threads=self.threads)
        built = {kind.name: kind.build(subject, setup) for kind in (TEXTBOOK, ONNX)}
        self.plan_keys = {count: plan.key for count, plan in zip(steps, plans, strict=True)}
        self.draws: dict[int, dict[str, Callable[[], object]]] = {
            count: {name: each.prepare(Workload(subject, plan, 1)) for name, each in built.items()}
            for count, plan in zip(steps, plans, strict=True)
        }

    def run(self, *, rounds: int = ROUNDS, burn: Mapping[int, float] | None = None) -> Run:
        """One measured run; `burn` are the seconds of busy work after each call of the engine, by step count."""
        facts = environment()
        return Run(
            facts, {"threads": self.threads}, tuple(self.case(n, rounds, (burn or {}).get(n)) for n in self.draws)
        )

    def case(self, steps: int, rounds: int, burn: float | None = None) -> Case:
        draws = dict(self.draws[steps])
        if burn is not None:
            draws[ENGINE] = slowed(draws[ENGINE], burn)
        calls = max(1, _NETWORK_RUNS // steps)
        times = take_turns({name: _repeated(draw, calls) for name, draw in draws.items()}, rounds=rounds)
        contenders = tuple(
            Contender(name, "ok", seconds=tuple(each / calls for each in seconds)) for name, seconds in times.items()
        )
        return Case("fashion-mnist", steps, 1, "float32", self.plan_keys[steps], contenders)


def slowed(call: Callable[[], object], seconds: float) -> Callable[[], object]:
    """`call`, then so many seconds of work: sleep would give the core away, which no regression does."""

    def run() -> object:
        result = call()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            pass
        return result

    return run


def measure_baseline(rounds: int) -> Run:
    return Trial().run(rounds=rounds)


def measure_pair(baseline: Run, rounds: int) -> list[dict[str, Any]]:
    return judged_pair(Trial(), baseline, rounds)


def judged_pair(trial: Trial, baseline: Run, rounds: int) -> list[dict[str, Any]]:
    """An unchanged and a slowed run of this process, and the gate's verdict on each."""
    unchanged = trial.run(rounds=rounds)
    burn = {case.steps: SLOWDOWN * _median(case) for case in unchanged.cases}
    slow = trial.run(rounds=rounds, burn=burn)
    found = []
    for run, planted in ((unchanged, {}), (slow, burn)):

        def again(case: Case, planted: Mapping[int, float] = planted) -> Case:
            return trial.case(case.steps, MORE_TURNS * rounds, planted.get(case.steps))

        try:
            found.append(as_record(compare_runs(baseline, run, measure_again=again), slowed=bool(planted)))
        except InputError as error:  # A machine too busy to be judged is neither a pass nor a catch.
            found.append({"slowed": bool(planted), "passed": None, "refused": str(error), "cases": []})
    return found


def as_record(comparison: Comparison, *, slowed: bool) -> dict[str, Any]:
    cases = [
        {
            "case": change.case,
            "verdict": change.verdict,
            "ratio_before": change.ratio_before,
            "ratio_now": change.ratio_now,
            "slowdown": change.slowdown,
            "interval": change.interval,
            "turns": change.turns,
            "measured_again": change.again,
        }
        for change in comparison.changes
        if change.slowdown is not None
    ]
    return {"slowed": slowed, "passed": comparison.passed, "cases": cases}


def planted_table(results: Path) -> str:
    """What the gate said of runs without and with a planted slowdown, one line a kind of run and case."""
    from skipstep.bench.markdown import describe_environment, markdown

    result = _read(results / "planted-slowdown.json")
    rows = []
    for slow in (False, True):
        runs = [run for run in result["runs"] if run["slowed"] is slow]
        for name in dict.fromkeys(case["case"] for run in runs for case in run["cases"]):
            cases = [case for run in runs for case in run["cases"] if case["case"] == name]
            seen = [case["slowdown"] for case in cases]
            rows.append(
                [
                    f"{result['planted']:.0%} slower" if slow else "unchanged",
                    name,
                    f"{statistics.median(seen):+.1%} ({min(seen):+.1%} … {max(seen):+.1%})",
                    f"{sum(case['measured_again'] for case in cases)} of {len(cases)}",
                    f"{sum(case['verdict'] == 'slower' for case in cases)} of {len(cases)}",
                ]
            )
    failed, pairs = result["failed_runs"], result["pairs"]
    refused = f", and refused {result['refused_runs']}" if result["refused_runs"] else ""
    return markdown(["our engine", "case", "slowdown seen", "measured again", "found slower"], rows) + (
        f"\n\nThe gate failed {failed['slowed']} of {pairs} slowed runs and {failed['unchanged']} of {pairs} unchanged "
        f"ones{refused}; limit {result['limit']:.0%}, {result['rounds']} turns a run, "
        f"{result['rounds'] * result['more_turns']} when measured again. {describe_environment(result['environment'])}."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            got=f"{path} ({error})",
            expected="a result of skipstep.bench.planted",
            remedy=f"run python -m skipstep.bench.planted --out {path}",
        ) from error
    return contents


def _repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def _median(case: Case) -> float:
    engine = case.contender(ENGINE)
    assert engine is not None, "it took turns here"
    return statistics.median(engine.seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=10, help="unchanged and slowed runs, each (default: 10)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns a run (default: {ROUNDS})")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    runs: list[dict[str, Any]] = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        # A baseline is measured once and used often: it has the turns of a second measurement.
        baseline = processes.submit(measure_baseline, MORE_TURNS * options.rounds).result()
        for pair in range(options.pairs):
            found = processes.submit(measure_pair, baseline, options.rounds).result()
            runs += found
            verdicts = ", ".join({True: "passed", False: "failed", None: "refused"}[run["passed"]] for run in found)
            print(f"{pair + 1} of {options.pairs}: unchanged, slowed: {verdicts}", file=sys.stderr, flush=True)
    failed = {
        name: sum(run["passed"] is False for run in runs if run["slowed"] is slow)
        for name, slow in (("unchanged", False), ("slowed", True))
    }
    refused = sum(run["passed"] is None for run in runs)
    write_json(
        options.out,
        {
            "planted": SLOWDOWN,
            "limit": LIMIT,
            "pairs": options.pairs,
            "rounds": options.rounds,
            "more_turns": MORE_TURNS,
            "seconds": round(time.perf_counter() - started, 1),
            "failed_runs": failed,
            "refused_runs": refused,
            "runs": runs,
        },
    )
    print(
        f"failed: {failed['slowed']} of {options.pairs} slowed, {failed['unchanged']} of {options.pairs} unchanged; "
        f"{refused} refused as measured on a busy machine"
    )
    return int(refused > 0 or failed != {"unchanged": 0, "slowed": options.pairs})


if __name__ == "__main__":
    raise SystemExit(main())
