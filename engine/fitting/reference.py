"""Converged trajectories of a network, over a grid of timesteps: what a plan is fitted to.

The network is evaluated through the engine's own loop: one step of DDIM to the level without noise returns the
predicted image, with the engine's clipping and guidance. The trajectories are solutions of the probability-flow ODE,
in lambda = ln(√a/√(1-a)):

    x_p = √(1-p)/√(1-a)·x_a + √(1-p)·∫ e^lambda·x0(lambda) dlambda

with x0 the polynomial through the last three predicted images (the multistep rule of Lu et al. 2022, arXiv 2211.01095,
at order 3; the integral is a quadrature). The step to the level without noise is the predicted image itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Unpack

import numpy as np
from numpy.typing import NDArray

from skipstep.calls.inputs import Prompted, embedded
from skipstep.calls.noise import sample_noise
from skipstep.calls.request import SampleRequest, resolve_request
from skipstep.errors import NonFiniteError, PlanError
from skipstep.kernels.layout import Stream
from skipstep.loops.contract import Array, Sampler
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.plan import Plan
from skipstep.plans.schedule import NoiseSchedule
from skipstep.plans.stages import Stages

_ORDER: Final = 3
_QUADRATURE: Final = np.polynomial.legendre.leggauss(16)


@dataclass(frozen=True, slots=True)
class Reference:
    """N trajectories: `states` and `images`, float32 `[J, N, *sample_shape]`, at the J `nodes` (timesteps, the noisiest
    first), and where they end, `[N, *sample_shape]`."""

    nodes: tuple[int, ...]
    states: Array
    images: Array
    ends: Array

    def few(self, count: int) -> Reference:
        """The first trajectories alone."""
        return Reference(self.nodes, self.states[:, :count], self.images[:, :count], self.ends[:count])


@dataclass(frozen=True, slots=True)
class Denoiser:
    """The predicted image of a state at a timestep, under the conditions of a call: N `noise` and their `request`."""

    engine: Sampler
    options: Mapping[str, Any]
    request: SampleRequest
    noise: Array
    _stages: dict[int, Stages] = field(default_factory=dict)

    @classmethod
    def of(cls, engine: Sampler, seeds: NDArray[np.uint64], **conditions: Unpack[Prompted]) -> Denoiser:
        """Raises PlanError for an engine without a schedule, and InputError for conditions that do not fit."""
        given = embedded(engine.runner.pipeline, engine.network, conditions)
        request = resolve_request(engine.network, seeds=seeds.tolist(), x_T=None, **given)
        return cls(engine, network_options(engine), request, sample_noise(engine.network, seeds, Stream.INITIAL))

    @property
    def schedule(self) -> NoiseSchedule:
        schedule: NoiseSchedule = self.options["schedule"]
        return schedule

    def level(self, timestep: int) -> float:
        return float(self.schedule.alpha_bar[timestep])

    def few(self, count: int) -> Denoiser:
        """The same for the first samples alone."""
        return replace(self, request=self.request.chunk(0, count), noise=self.noise[:count])

    def __call__(self, state: Array, timestep: int) -> Array:
        if timestep not in self._stages:
            self._stages[timestep] = Stages.of([Plan(**self.options, timesteps=[timestep])])
        return self.engine.runner.run(self._stages[timestep], replace(self.request, x_T=state))


def network_options(engine: Sampler) -> dict[str, Any]:
    """What all plans of this engine's network have in common. Raises PlanError where it has no schedule."""
    kept = (
        "schedule",
        "prediction_type",
        "time_input",
        "sigma_data",
        "clip",
        "dynamic_quantile",
        "dynamic_maximum",
        "convention",
    )
    if "schedule" not in engine.plan_defaults:
        raise PlanError(
            got="an engine without a schedule",
            expected="that of the network's training",
            remedy="pass schedule= to Engine.build",
        )
    return {name: engine.plan_defaults[name] for name in kept if name in engine.plan_defaults}


def integrate(denoiser: Denoiser, nodes: Sequence[int], *, progress: Callable[[], object] = lambda: None) -> Reference:
    """The trajectories from each noise over `nodes`; `progress` is called after each. Raises NonFiniteError."""
    levels = [denoiser.level(t) for t in nodes]
    state, states, images = denoiser.noise, [], []
    for j, timestep in enumerate(nodes):
        image = denoiser(state, timestep)
        states.append(state)
        images.append(image)
        progress()
        if j + 1 < len(nodes):
            # A level without any image has no place on the axis.
            past = [k for k in range(j, max(-1, j - _ORDER), -1) if levels[k] > 0.0] or [j]
            of_state, of_images = multistep_row([levels[k] for k in past], levels[j + 1])
            state = of_state * state + sum(w * images[k] for w, k in zip(of_images, past, strict=True))
            state = state.astype(np.float32)
    if not np.isfinite(images[-1]).all():
        raise NonFiniteError(
            got="trajectories that end in NaN or infinity",
            expected="a network whose trajectories converge",
            remedy="check prediction_type and schedule: they must be those of the network's training",
        )
    return Reference(tuple(nodes), np.stack(states), np.stack(images), images[-1])


def multistep_row(levels: Sequence[float], target: float) -> tuple[float, NDArray[np.float64]]:
    """The weights of the state, and of the images at `levels` (the newest first), of a step to the level `target`."""
    now = levels[0]
    shrink = np.sqrt((1.0 - target) / (1.0 - now))
    if now == 0.0 or len(levels) == 1:
        return float(shrink), np.array([np.sqrt(target) - np.sqrt(now) * shrink])
    axis = np.array([_log_snr(level) for level in levels])
    start, end = axis[0], _log_snr(target)
    points, weights = _QUADRATURE
    places = (start + end) / 2 + (end - start) / 2 * points
    basis = [
        np.prod([(places - axis[m]) / (axis[k] - axis[m]) for m in range(len(axis)) if m != k], axis=0)
        for k in range(len(axis))
    ]
    integrals = [(end - start) / 2 * np.sum(weights * np.exp(places) * each) for each in basis]
    return float(shrink), np.sqrt(1.0 - target) * np.array(integrals)


def _log_snr(level: float) -> float:
    return float(np.log(level / (1.0 - level)) / 2)


def grid_of(schedule: NoiseSchedule, count: int) -> tuple[int, ...]:
    """About `count` timesteps over the whole schedule, decreasing: at equal distances, halfway in the timestep and in
    log-SNR, so that neither end is left to a few steps."""
    levels = schedule.alpha_bar
    positive = np.maximum(levels, np.nextafter(0.0, 1.0) if levels[-1] > 0.0 else levels[levels > 0.0][-1] / 4)
    axis = -np.log(positive / (1.0 - positive))
    share = np.arange(len(levels)) / max(1, len(levels) - 1)
    mixed = (share + (axis - axis[0]) / max(axis[-1] - axis[0], 1e-12)) / 2
    wanted = np.linspace(mixed[0], mixed[-1], min(count, len(levels)))
    places = np.unique(np.abs(mixed[None, :] - wanted[:, None]).argmin(axis=1))
    return tuple(int(t) for t in places[::-1])


def conditions_of(network: NetworkSpec, num: int, given: Prompted, first: int = 0) -> Prompted:
    """The conditions of `num` trajectories from number `first` on: as given; prompts, or else all classes, in turn."""
    conditions = given.copy()
    if network.num_classes is not None and conditions.get("class_labels") is None:
        conditions["class_labels"] = [i % network.num_classes for i in range(num)]
    prompts = conditions.get("prompt")
    if isinstance(prompts, list | tuple) and prompts:
        conditions["prompt"] = [prompts[(first + i) % len(prompts)] for i in range(num)]
    return conditions
