"""What an engine holds and how it runs, in words."""

from __future__ import annotations

from skipstep.backends.registry import capabilities
from skipstep.latency.tuning import Tunable


def describe(engine: Tunable) -> str:
    """What the engine holds and how it runs, one fact a line."""
    network, sizes, loop = engine.network, engine.batch_sizes, engine.runner.loop
    shape = "×".join(map(str, network.sample_shape))
    takes = ", ".join(network.described_conditions) or "unconditional"
    guidance = ", with guidance" if network.can_guide else ""
    library = capabilities(engine.backend, loop.device)
    latencies: list[str] = []
    if engine.calibration is not None:
        from skipstep.latency.calibration import describe_latencies

        latencies = describe_latencies(engine.calibration, engine.plans)
    return "\n".join(
        [
            f"network     {shape}, {takes}{guidance}",
            f"backend     {engine.backend} on {loop.device}",
            f"precision   {engine.precision}" + (f"; {library}" if library else ""),
            *([f"nodes       {loop.placement}"] if loop.placement else []),
            f"loop        {loop.name}",
            f"batch sizes {f'up to {max(sizes)}' if loop.any_batch else ', '.join(map(str, sizes))}",
            *(f"plan        {plan!r}" for plan in engine.plans.values()),
            *(f"graph       {report}" for report in loop.reports),
            *latencies,
        ]
    )
