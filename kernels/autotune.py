"""Choosing a launch by measuring, in place of the rule of skipstep.kernels.launch.

Each round measures all candidates, so that a slow period of the device does not affect only one, and measures the
rule's choice at the start and at the end: the difference between these two times is the noise. Another launch replaces
the rule's choice only if the median of its gains within rounds is more than twice the median noise, and more than 2 %.
So on a device where the launch does not matter the rule's choice stands, and two tunings of one device agree.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

from skipstep.errors import InputError, check_choice, check_integer, check_type
from skipstep.kernels.launch import StepLaunch, choose_launch, least_elements_per_thread
from skipstep.kernels.layout import NUM_COLUMNS, Column, StepFlags
from skipstep.storage.untrusted import own_rules, read_dataclass

ITEM_SIZES: Final[Mapping[str, int]] = {"float16": 2, "bfloat16": 2, "float32": 4}

_LEAST_GAIN: Final = 0.02
_NOISE_FACTOR: Final = 2.0
_WARPS: Final = (1, 2, 4, 8)
# With more, the kernel with noise takes up to 105 registers and only half of the warps fit.
_MOST_ELEMENTS_PER_THREAD: Final = 16


@dataclass(frozen=True, slots=True)
class LaunchCase:
    """The case that a launch is tuned for: `batch_size` samples of `num_elements` = C·H·W, and the network's dtype."""

    num_elements: int
    batch_size: int
    network_dtype: str

    def __post_init__(self) -> None:
        for name in ("num_elements", "batch_size"):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), low=1))
        remedy = "pass the dtype of the network's input and output"
        check_choice("network_dtype", self.network_dtype, tuple(ITEM_SIZES), remedy=remedy)

    @property
    def item_size(self) -> int:
        return ITEM_SIZES[self.network_dtype]


@dataclass(frozen=True, slots=True)
class TunedLaunch:
    """The launch for a case. `gain`, not stored: the share of time saved against the rule; 0 if that was kept."""

    case: LaunchCase
    launch: StepLaunch
    gain: float = field(default=0.0, compare=False)

    def to_json(self) -> dict[str, Any]:
        """A flat object that `from_json` reads."""
        return {**asdict(self.case), **asdict(self.launch)}

    @classmethod
    def from_json(cls, value: object, where: str = "a tuned launch") -> Self:
        """Read what `to_json` wrote. Raises BundleError for anything else, also for unknown keys."""
        stored = read_dataclass(_StoredLaunch, value, where)
        with own_rules(where):
            case = LaunchCase(stored.num_elements, stored.batch_size, stored.network_dtype)
            return cls(case, StepLaunch(stored.block_size, stored.num_warps))


@dataclass(frozen=True, slots=True)
class _StoredLaunch:
    """The JSON form of a TunedLaunch."""

    num_elements: int
    batch_size: int
    network_dtype: str
    block_size: int
    num_warps: int


def candidates(case: LaunchCase, *, num_multiprocessors: int, compute_capability: int) -> tuple[StepLaunch, ...]:
    """The rule's choice, then every other launch with 16-byte accesses of 1 to 8 warps. Raises InputError."""
    check_type("case", case, LaunchCase, remedy="pass LaunchCase(num_elements, batch_size, network_dtype)")
    chosen = choose_launch(
        num_elements=case.num_elements,
        batch_size=case.batch_size,
        num_multiprocessors=num_multiprocessors,
        compute_capability=compute_capability,
        network_item_size=case.item_size,
    )
    launches = {chosen: None}
    elements = least_elements_per_thread(case.item_size)
    while elements <= _MOST_ELEMENTS_PER_THREAD:
        launches |= dict.fromkeys(StepLaunch(32 * warps * elements, warps) for warps in _WARPS)
        elements *= 2
    return tuple(launches)


def tune_launch(
    measure: Callable[[StepLaunch], float], launches: Sequence[StepLaunch], *, case: LaunchCase, repeats: int = 20
) -> TunedLaunch:
    """The launch for `case`: the first, unless another beats it by the rule above.

    `measure` returns the seconds of one step. Its first call for each launch does not count: it may compile. `repeats`
    rounds, at least 5. Raises InputError, also if a measurement is not a positive number.
    """
    if not launches or repeats < 5:
        raise InputError(
            got=f"{len(launches)} launches, {repeats} repeats",
            expected="at least 1 launch and 5 repeats",
            remedy="pass candidates(...) and more repeats",
        )
    rule, *others = launches

    def seconds(launch: StepLaunch) -> float:
        value = measure(launch)
        if not 0 < value < math.inf:
            raise InputError(
                got=f"{value} seconds for a step", expected="a positive number", remedy="correct the measuring function"
            )
        return value

    for launch in launches:
        seconds(launch)
    noise: list[float] = []
    gains: dict[StepLaunch, list[float]] = {launch: [] for launch in others}
    for round_index in range(repeats):
        before = seconds(rule)
        # In alternating order, so that no launch always follows the same one.
        times = {launch: seconds(launch) for launch in (others if round_index % 2 else others[::-1])}
        after = seconds(rule)
        noise.append(abs(math.log(after / before)))
        for launch, time in times.items():
            gains[launch].append(math.log((before + after) / 2 / time))
    needed = max(_NOISE_FACTOR * statistics.median(noise), _LEAST_GAIN)
    medians = {launch: statistics.median(values) for launch, values in gains.items()}
    best = max(medians, key=lambda launch: medians[launch], default=rule)
    if best == rule or medians[best] <= needed:
        return TunedLaunch(case, rule)
    return TunedLaunch(case, best, gain=1 - math.exp(-medians[best]))


def step_to_measure(case: LaunchCase, flags: StepFlags, device: str) -> Callable[[StepLaunch], None]:
    """A step of a plan with `flags`, with its own buffers, as a function of its launch. Raises InputError."""
    import torch

    from skipstep.kernels.step import ddim_step

    dtype: torch.dtype = getattr(torch, case.network_dtype)
    shape = (case.batch_size, 1, case.num_elements, 1)
    copies, channels = 1 + flags.guided, 1 + flags.wide_output
    state = torch.zeros(shape, device=device)
    ones = torch.ones(case.batch_size, device=device)
    # The state stays finite for any number of steps: it tends to the network's output.
    table = torch.zeros(1, 1, NUM_COLUMNS, device=device)
    for column in (Column.X0_X, Column.EPS_OUT, Column.CLIP):
        table[..., column] = 1.0
    for column in (Column.C_X0, Column.C_EPS):
        table[..., column] = 0.5
    operands: dict[str, Any] = {
        "state": state,
        "model_output": torch.ones(copies * case.batch_size, channels, *shape[2:], dtype=dtype, device=device),
        "network_input": torch.empty(copies * case.batch_size, *shape[1:], dtype=dtype, device=device),
        "table": table,
        "stage": 0,
        "flags": flags,
        "seeds": torch.arange(case.batch_size, device=device),
        "guidance": ones,
        "rescale": ones,
        "bound": ones,
        "history": torch.zeros(flags.num_slots, *shape, device=device),
        "broken": torch.ones(case.batch_size, dtype=torch.int32, device=device),
    }
    return lambda launch: ddim_step(**operands, launch=launch)


def device_seconds(
    step: Callable[[StepLaunch], None], device: str, lock: AbstractContextManager[object], *, launches: int = 64
) -> Callable[[StepLaunch], float]:
    """Measures on a CUDA device: seconds a step, by events around a graph of `launches` steps.

    A graph, because a launch from the host takes longer than the step of a small sample. `lock` keeps recordings of one
    process apart; other threads may go on with their own work.
    """
    import torch

    graphs: dict[StepLaunch, torch.cuda.CUDAGraph] = {}

    def measure(launch: StepLaunch) -> float:
        with torch.cuda.device(device):
            return seconds(launch)

    def seconds(launch: StepLaunch) -> float:
        if launch not in graphs:
            step(launch)
            with lock:
                torch.cuda.synchronize(device)
                graphs[launch] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[launch], capture_error_mode="thread_local"):
                    for _ in range(launches):
                        step(launch)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graphs[launch].replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / launches

    return measure


def tune_on_device(
    case: LaunchCase, flags: StepFlags, *, device: str, lock: AbstractContextManager[object], repeats: int = 20
) -> TunedLaunch:
    """Measure on a CUDA device ("cuda:0"): about 12 launches, one or two seconds, most of them for compilation."""
    import torch

    facts = torch.cuda.get_device_properties(device)
    launches = candidates(
        case, num_multiprocessors=facts.multi_processor_count, compute_capability=10 * facts.major + facts.minor
    )
    step = step_to_measure(case, flags, device)
    return tune_launch(device_seconds(step, device, lock), launches, case=case, repeats=repeats)
