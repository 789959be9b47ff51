"""The plans of the bundles in tests, and engines that are saved."""

from __future__ import annotations

from engines import build

from skipstep import NoiseSchedule, Plan

SCHEDULE = NoiseSchedule.cosine(1000)


PLANS = [
    2,
    Plan(schedule=SCHEDULE, steps=4, solver="ddpm"),
    Plan(schedule=NoiseSchedule.linear(1000), steps=3, solver="rk4"),
    Plan(schedule=SCHEDULE, timesteps=[900, 400, 10], clip="dynamic", dynamic_quantile=0.8),
]


def make(network, **options):
    return build(network, **{"backend": "onnxruntime", "schedule": SCHEDULE, **options})
