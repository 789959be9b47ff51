"""What was measured, held against what the design aims at on a GPU. An aim without a number says why there is none.

The network sizes that launches bound are the CIFAR-10 architecture's at batch 1; arithmetic bounds the 256×256 one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from skipstep.bench.gpu.latency import latency_rows, seconds_per_step
from skipstep.bench.gpu.tasks import AIMS_FILE, CAPTURED, EAGER, REPLAYED
from skipstep.bench.markdown import read_result
from skipstep.bench.record import write_whole
from skipstep.latency.table import format_table

_LAUNCH_BOUND: Final = "cifar10-architecture"
_COMPUTE_BOUND: Final = "celebahq256-architecture"
# Of what a step moves: below this, launching it is most of what is measured.
_LARGE_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Aim:
    """`measured` shall be at least or at most `bound`; None for either where nothing was measured, and `why`."""

    aim: str
    unit: str
    sense: str
    bound: float
    measured: float | None
    met: bool | None
    why: str = ""


def hold_against_aims(results: Path) -> list[Aim]:
    """The aims in order, from whatever files of a run there are."""
    per_step = seconds_per_step(results)
    ours = per_step.get((_LAUNCH_BOUND, 1, CAPTURED))

    def ratio_to(other: str) -> float | None:
        theirs = per_step.get((_LAUNCH_BOUND, 1, other))
        return theirs / ours if theirs and ours else None

    proofs = _measured(results / "proofs.json")
    return [
        _aim("CIFAR-10 UNet at batch 1, a step", "ms", "at most", 0.4, None if ours is None else ours * 1e3),
        _aim("the same against eager diffusers, per step", "×", "at least", 10.0, ratio_to(EAGER)),
        _aim("the same against its network replayed as one graph per step", "×", "at least", 1.3, ratio_to(REPLAYED)),
        _aim("256×256, batch 1: time beyond S × the network", "%", "at most", 1.0, _beyond_network(results)),
        _aim("step kernel against a copy, large tensors, the slowest", "%", "at least", 90.0, _bandwidth(results)),
        _aim("graph launches a call", "", "at most", 1.0, proofs.get("graph_launches")),
        _aim("kernels launched outside of the graph", "", "at most", 0.0, proofs.get("kernel_launches")),
        _aim("waits of the host a call", "", "at most", 1.0, proofs.get("waits")),
    ]


def write_aims(results: Path, environment: Mapping[str, Any]) -> None:
    aims = [asdict(aim) for aim in hold_against_aims(results)]
    write_whole(results / AIMS_FILE, {"environment": dict(environment), "aims": aims})


def print_summary(out: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Print what a person at the machine wants to know; the files have the rest."""
    rows = [[each["task"], each["status"], f"{each['seconds']:.0f}", each["reason"][:90]] for each in records]
    print("\n" + format_table(["task", "status", "s", ""], rows))
    lines = [[*map(str, key), f"{seconds * 1e3:.3f}"] for key, seconds in seconds_per_step(out).items()]
    if lines:
        print("\n" + format_table(["network", "batch", "contender", "ms per step"], lines))
    aims = read_result(out / AIMS_FILE)["aims"]
    print("\n" + format_table(["aim", "bound", "measured", "met"], [aim_row(aim) for aim in aims]))
    print(f"\nresults in {out}")


def aim_row(aim: Mapping[str, Any]) -> list[str]:
    """An aim as cells: what, its bound, what was measured, and whether that meets it."""
    measured = "–" if aim["measured"] is None else f"{aim['measured']:.3g}{_space(aim['unit'])}"
    met = {True: "yes", False: "no", None: aim["why"]}[aim["met"]]
    return [aim["aim"], f"{aim['sense']} {aim['bound']:g}{_space(aim['unit'])}", measured, met]


def _space(unit: str) -> str:
    return f" {unit}" if unit.isalpha() else unit


def _beyond_network(results: Path) -> float | None:
    """Of a whole call with the most steps, so that what it costs once counts as well."""
    rows = [row for row in latency_rows(results) if (row["model"], row["batch_size"]) == (_COMPUTE_BOUND, 1)]
    alone = [row["network_seconds"] for row in rows if "network_seconds" in row]
    calls = [(row["plan"]["steps"], row["median"]) for row in rows if row["contender"] == CAPTURED]
    if not alone or not calls:
        return None
    steps, seconds = max(calls)
    return float(100 * (seconds / (steps * alone[-1]) - 1))


def _bandwidth(results: Path) -> float | None:
    cases = _measured(results / "step-kernel.json").get("cases", ())
    shares = [case["step_against_copy"] for case in cases if case.get("bytes", 0) >= _LARGE_BYTES]
    return 100 * min(shares) if shares else None


def _aim(aim: str, unit: str, sense: str, bound: float, measured: float | None) -> Aim:
    if measured is None:
        return Aim(aim, unit, sense, bound, None, None, "not measured")
    met = measured <= bound if sense == "at most" else measured >= bound
    return Aim(aim, unit, sense, bound, float(measured), met)


def _measured(path: Path) -> dict[str, Any]:
    return read_result(path) if path.exists() else {}
