"""In place of a diffusers pipeline's network and scheduler during a call: what lets an engine draw in its loop.

The scheduler has the timesteps of a plan, and the network notes what the loop gives it. The whole loop is drawn at its
first step; or a step at a time, where something else happens between the steps: a callback, fresh noise of the call's
generator, a picture that is kept in part.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from skipstep.calls.request import SampleRequest, resolve_request
from skipstep.errors import InputError, PlanNotFoundError
from skipstep.kernels.layout import Column
from skipstep.networks.spec import PROMPTS
from skipstep.pipelines.spec import MASKED
from skipstep.plans.stages import Stages


def refused(what: str, remedy: str) -> InputError:
    return InputError(got=f"{what} for an accelerated pipeline", expected="what its engine can do", remedy=remedy)


class Network:
    """In place of a pipeline's network: it notes what it is given, and predicts zeros that no one reads."""

    def __init__(self, real: Any, walk: Walk) -> None:
        self._real, self._walk = real, walk

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(
        self,
        sample: Any,
        timestep: Any,
        encoder_hidden_states: Any = None,
        *,
        timestep_cond: Any = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        for name, value in others.items():
            if value is not None:
                raise refused(f"the network's argument {name}", "call the pipeline that this one was made of")
        channels = self._walk.engine.network.sample_shape[0]
        inputs = {PROMPTS: encoder_hidden_states, **(added_cond_kwargs or {})}
        if sample.shape[1] > channels:
            inputs[MASKED] = sample[:, channels:]
        self._walk.note(sample, {name: value for name, value in inputs.items() if value is not None})
        nothing = sample.new_zeros((len(sample), channels, *sample.shape[2:]))
        return SimpleNamespace(sample=nothing) if return_dict else (nothing,)


class Walk:
    """In place of a pipeline's scheduler: the timesteps of a plan, and at each step the state that an engine leads to.

    `stepwise`: something may change the latents between the steps.
    """

    order, init_noise_sigma = 1, 1.0

    def __init__(self, pipe: Any, engine: Any, stepwise: bool, eta: float, held: ExitStack) -> None:
        self.pipe, self.engine, self._stepwise, self._eta, self._held = pipe, engine, stepwise, eta, held
        self._real = pipe.scheduler
        self._inputs: dict[str, Any] = {}
        self._given: dict[str, Any] | None = None
        self._result: Any = None
        self._runs: list[tuple[slice, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, **options: Any) -> None:
        import torch

        held = sorted({each.steps or 0 for each in self.engine.plans.values()})
        try:
            plan = self.engine.select_plan(steps=num_inference_steps)
        except PlanNotFoundError as error:
            raise PlanNotFoundError(
                got=f"num_inference_steps={num_inference_steps}, which no plan has",
                expected=error.expected,
                remedy=f"pass one of {held}, or compile_on_miss=True to skipstep.accelerate",
            ) from error
        if self._eta not in (0.0, plan.eta):
            raise refused(
                f"eta={self._eta:g} and {plan!r}", f"pass skipstep.accelerate a Plan with eta={self._eta:g}, or eta=0"
            )
        if any(value is not None for value in options.values()):  # A consistency model spaces a part of the steps anew.
            own = copy.deepcopy(self._real)
            own.set_timesteps(num_inference_steps, **options)
            plan = replace(plan, steps=None, timesteps=tuple(map(int, own.timesteps)))
        self._plan, self._steps = plan, list(plan.timesteps)
        self.timesteps = torch.tensor(self._steps, device=device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The first step says it, too."""

    def scale_model_input(self, sample: Any, timestep: Any = None) -> Any:
        return sample

    def add_noise(self, original_samples: Any, noise: Any, timesteps: Any) -> Any:
        level = self._plan.alpha_bars[self._index(timesteps)]
        return float(np.sqrt(level)) * original_samples + float(np.sqrt(1.0 - level)) * noise

    def _index(self, timesteps: Any) -> int:
        return self._steps.index(int(timesteps.flatten()[0]))

    def note(self, sample: Any, inputs: dict[str, Any]) -> None:
        """What the network is given at a step. Raises InputError where a callback changed it after the first."""
        now = {**inputs, "guidance_scale": getattr(self.pipe, "guidance_scale", None)}
        if self._given is None:
            side = self.engine.network.sample_shape[1:]
            if tuple(sample.shape[2:]) != side:
                raise refused(
                    f"a picture of {' by '.join(map(str, sample.shape[2:]))} latents, not {side[0]} by {side[1]},",
                    "pass height= and width= of these pictures to skipstep.accelerate",
                )
            self._inputs, self._num_rows = inputs, len(sample)
            self._given = {name: each.clone() if hasattr(each, "clone") else each for name, each in now.items()}
            return
        if not self._stepwise:
            return
        for name, first in self._given.items():
            if not bool((now[name] == first).all() if hasattr(first, "all") else now[name] == first):
                raise refused(f"a callback that changes {name}", "change the latents alone, or call the original")

    def step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True, **_: Any
    ) -> Any:
        if self._result is None:
            self._start(self._index(timestep), sample)
        result = self._advanced(self._index(timestep), sample, generator) if self._runs else self._result
        return SimpleNamespace(prev_sample=result) if return_dict else (result, result)

    def _start(self, index: int, sample: Any) -> None:
        request = self._request(sample)
        plan = self._plan if index == 0 else self._plan.started_at(index)
        stages, runner = Stages.of([plan]), self.engine.runner
        self.engine.plans.check_guidance([plan], request.guidance)
        if not (self._stepwise or stages.adds_noise):
            drawn = runner.loop.new_samples(tuple(sample.shape))
            runner.draw(stages, request, drawn)
            self._result = _like(drawn, sample)
            return
        if self.engine.device != "cpu" and len(self.engine.split(len(sample))) > 1:
            raise refused(
                f"{len(sample)} pictures in batches of {self.engine.batch_sizes}, a step at a time",
                f"pass batch_sizes=[{len(sample)}] to skipstep.accelerate",
            )
        # The noise comes from the call's generator.
        self._sigmas = stages.table[:, 0, Column.SIGMA].copy() if stages.adds_noise else np.zeros(len(stages))
        flags = tuple(replace(each, add_noise=False) for each in stages.flags)
        stages = replace(stages, flags=flags, structures={})
        self._first, self._ends = index, np.flatnonzero(stages.ends_step)
        for part, its_stages, its_request in runner.parts(stages, request):
            self._runs.append((part, self._held.enter_context(runner.loop.start(its_stages, its_request))))
        self._result = sample

    def _advanced(self, index: int, sample: Any, generator: Any) -> Any:
        from diffusers.utils.torch_utils import randn_tensor

        last = int(self._ends[index - self._first])
        start = 0 if index == self._first else int(self._ends[index - self._first - 1]) + 1
        made = np.empty(tuple(sample.shape), np.float32)
        latents = sample.detach().float().cpu().numpy()
        for part, run in self._runs:
            state = run.state()
            size = part.stop - part.start
            state[:size] = latents[part]
            run.set_state(state)
            for stage in range(start, last + 1):
                run.advance(stage)
            made[part] = run.state()[:size]
        found = _like(made, sample)
        if sigma := float(self._sigmas[last]):
            found = found + sigma * randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=sample.dtype
            )
        return found

    def _request(self, sample: Any) -> SampleRequest:
        network, count = self.engine.network, len(sample)
        guided = self._num_rows == 2 * count
        halves: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        for name, rows in self._inputs.items():
            without, given = (rows[:count], rows[count:]) if guided else (rows, rows)
            halves[0][name] = given.detach().float().cpu().numpy()
            if guided and network.all_conditions[name].null == "given":
                halves[1][name] = without.detach().float().cpu().numpy()
            elif not bool((without == given).all()):
                raise refused(f"another {name} for the unconditional half of guidance", "pass the same for both")
        return resolve_request(
            network,
            seeds=None,
            x_T=sample.detach().float().to(self.engine.device),
            device=self.engine.device,
            guidance_scale=self.pipe.guidance_scale if guided or network.takes_guidance else None,
            guidance_rescale=(getattr(self.pipe, "guidance_rescale", None) or None) if guided else None,
            conditions=halves[0],
            negative_conditions=halves[1] or None,
        )


def _like(drawn: Any, sample: Any) -> Any:
    import torch

    return torch.as_tensor(drawn).to(device=sample.device, dtype=sample.dtype)
