"""Sampling by plan: which plan a call means, how its samples are split over batch sizes, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack, get_args

import numpy as np
from numpy.typing import NDArray

from skipstep.backends import BackendName
from skipstep.batching import split_batch
from skipstep.errors import InputError, NonFiniteError, PlanError, PlanNotFoundError
from skipstep.loop import Loop, run_loop
from skipstep.network import NetworkSpec
from skipstep.plan import Plan, check_plan_fits
from skipstep.request import Conditions, SampleRequest, resolve_request
from skipstep.stages import Stages
from skipstep.trajectory import Callback, Progress, Trajectory, Watch

OutputType = Literal["np", "pt", "pil"]


class Sampler:
    """A network's loops and the plans that were made for it. Calls from several threads are safe.

    `plans` and `batch_sizes` say what it holds, `backend` and `device` where it runs. `loops` are by the network's
    batch size; with `any_batch` they are one, which takes every size, and the largest of batch_sizes is the most that
    it is given at once.
    """

    def __init__(
        self,
        network: NetworkSpec,
        *,
        loops: Mapping[int, Loop],
        batch_sizes: Sequence[int],
        backend: BackendName,
        device: str,
        plan_defaults: Mapping[str, Any],
        compile_on_miss: bool = False,
        any_batch: bool = False,
    ) -> None:
        self.network = network
        self.any_batch = any_batch
        self.batch_sizes = tuple(sorted(batch_sizes))
        self.backend = backend
        self.device = device
        self.compile_on_miss = compile_on_miss
        self.plans: dict[str, Plan] = {}
        self.loops = loops
        self.plan_defaults = plan_defaults

    def add_plan(self, plan: int | Plan, *, eta: float = 0.0) -> Plan:
        """Hold one more plan and return it; `eta` is that of a step count. Raises PlanError where it does not fit."""
        if not isinstance(plan, Plan):
            if "schedule" not in self.plan_defaults:
                raise PlanError(
                    got=f"the step count {plan!r} for a model without a scheduler configuration",
                    expected="a noise schedule",
                    remedy="pass schedule=, e.g. NoiseSchedule.linear(1000), or a Plan",
                )
            plan = Plan(**{**self.plan_defaults, "steps": plan, "eta": eta})
        trained = self.plan_defaults.get("prediction_type")
        if trained is not None and plan.prediction_type != trained:
            raise PlanError(
                got=f"a plan for {plan.prediction_type} prediction",
                expected=f"{trained}, which this network was trained to predict",
                remedy=f"make the plan with prediction_type={trained!r}",
            )
        check_plan_fits(plan, self.network)
        self.plans[plan.key] = plan
        return plan

    def sample(
        self,
        *,
        steps: int | None = None,
        plan: Plan | Sequence[Plan] | None = None,
        seeds: int | Sequence[int] | None = None,
        x_T: Any = None,
        output_type: OutputType = "np",
        trajectory: bool | int = False,
        callback: Callback | None = None,
        progress: Progress | None = None,
        **conditions: Unpack[Conditions],
    ) -> Any:
        """Draw samples with the plan of `steps` steps, or with `plan`.

        plan            one for all samples, or a list with one for each: of equal structure, but each with its own
                        timesteps and eta (skipstep.stages.Stages).
        seeds           an int for every sample, or one each, in [0, 2**64): a sample depends on its seed, not on its
                        place in the batch. They also key the noise that a plan adds.
        x_T             `[B, C, H, W]` NumPy or torch, the initial noise instead of that of the seeds.
        conditions      class_labels, prompt_embeds, negative_prompt_embeds, guidance_scale and guidance_rescale
                        (skipstep.request.Conditions).
        output_type     "np": float32 `[B, C, H, W]` in the network's range ([-1, 1] for pixels); "pt": the same as a
                        torch tensor; "pil": a list of 8-bit pictures.
        trajectory      True, or a stride of steps: returns (samples, Trajectory) instead of the samples.
        callback        called as callback(StepEvent) after every step.
        progress        called as progress(done, total), in network evaluations.

        Returns new memory every time. Raises InputError, PlanError, PlanNotFoundError, and NonFiniteError where the
        network returned NaN.
        """
        _check_output_type(output_type)
        plans = self._chosen_plans(steps, plan)
        stages = Stages.of(plans)
        request = resolve_request(
            self.network,
            seeds=seeds,
            x_T=x_T,
            adds_noise=stages.adds_noise,
            num_plans=len(plans),
            **conditions,
        )
        kept = None
        if trajectory is not False:
            shape = (request.num_samples, *self.network.sample_shape)
            kept = Trajectory.empty(sum(stages.ends_step), 1 if trajectory is True else trajectory, shape)
        result = self.run(stages, request, progress=progress, callback=callback, trajectory=kept)
        samples = self.as_output(result, output_type)
        return samples if kept is None else (samples, kept)

    def run(
        self,
        stages: Stages,
        request: SampleRequest,
        *,
        progress: Progress | None = None,
        callback: Callback | None = None,
        trajectory: Trajectory | None = None,
    ) -> NDArray[np.float32]:
        """Split a request over the batch sizes and walk them all; x_0 `[B, C, H, W]`. Arguments are taken as checked.

        Raises NonFiniteError where the network returned NaN.
        """
        runs = self.split(request.num_samples)
        watch = Watch(stages, len(runs), progress, callback, trajectory)
        result = np.empty((request.num_samples, *self.network.sample_shape), np.float32)
        start = 0
        for size in runs:
            loop = self.loop_for(size, request)
            wanted = min(size, request.num_samples - start)
            observer = watch.chunk(start, wanted)
            if observer is not None and not loop.can_observe:
                raise InputError(
                    got=f"progress, callback or trajectory with the {loop.name} loop",
                    expected="nothing that looks on: it runs all steps in one launch",
                    remedy="use the stepwise loop",
                )
            drawn = run_loop(
                loop,
                stages.chunk(start, size),
                request.chunk(start, size),
                observer=observer,
                keep_x0=watch.needs_x0,
            )
            result[start : start + wanted] = drawn[:wanted]
            start += size
        check_finite(result)
        return result

    def split(self, num_samples: int) -> list[int]:
        """The batch sizes of the runs that draw so many samples; the last may draw more than are left."""
        if not self.any_batch:
            return split_batch(num_samples, self.batch_sizes)
        largest = self.batch_sizes[-1]
        rest = num_samples % largest
        return [largest] * (num_samples // largest) + ([rest] if rest else [])

    def loop_for(self, batch_size: int, request: SampleRequest) -> Loop:
        """The loop that runs `batch_size` samples of this request; with guidance the network's batch is twice that."""
        return next(iter(self.loops.values())) if self.any_batch else self.loops[request.num_copies * batch_size]

    def select_plan(self, *, steps: int | None = None, plan: Plan | None = None) -> Plan:
        """The held plan with that step count, or the given one. Raises PlanNotFoundError, listing what is held."""
        if (steps is None) == (plan is None):
            raise InputError(
                got="neither steps nor plan" if steps is None else "both steps and plan",
                expected="one of them",
                remedy="pass steps=20, or plan=",
            )
        if plan is not None:
            if not isinstance(plan, Plan):
                raise InputError(
                    got=f"plan of type {type(plan).__name__}", expected="a Plan", remedy="pass one, or use steps=20"
                )
            if plan.key not in self.plans and not self.compile_on_miss:
                raise self._miss(f"{plan!r}, which this engine does not hold")
            return self.plans.get(plan.key) or self.add_plan(plan)
        held = [p for p in self.plans.values() if p.steps == steps]
        if len(held) == 1:
            return held[0]
        if len(held) > 1:
            raise PlanNotFoundError(
                got=f"steps={steps}, which {len(held)} plans have: {', '.join(map(repr, held))}",
                expected="a choice between them",
                remedy="pass plan=",
            )
        if self.compile_on_miss and steps is not None:
            return self.add_plan(steps)
        raise self._miss(f"steps={steps!r}, which no plan of this engine has")

    def describe(self) -> str:
        """What the engine holds and how it runs, one fact a line."""
        shape = "×".join(map(str, self.network.sample_shape))
        classes = "unconditional" if self.network.num_classes is None else f"{self.network.num_classes} classes"
        if self.network.prompt_shape is not None:
            classes = "prompts of {}×{}".format(*self.network.prompt_shape)
        guidance = ", with guidance" if self.network.can_guide else ""
        loop = next(iter(self.loops.values())).name
        sizes = self.batch_sizes
        return "\n".join(
            [
                f"network     {shape}, {classes}{guidance}",
                f"backend     {self.backend} on {self.device}",
                f"loop        {loop}",
                f"batch sizes {f'up to {max(sizes)}' if self.any_batch else ', '.join(map(str, sizes))}",
                *(f"plan        {plan!r}" for plan in self.plans.values()),
            ]
        )

    def _chosen_plans(self, steps: int | None, plan: Plan | Sequence[Plan] | None) -> list[Plan]:
        if isinstance(plan, Sequence) and not isinstance(plan, str):
            if not plan or steps is not None:
                raise InputError(
                    got="an empty list of plans" if not plan else "both steps and plan",
                    expected="a plan per sample",
                    remedy="pass plan=[...], one for each sample, and leave steps out",
                )
            return [self.select_plan(plan=each) for each in plan]
        return [self.select_plan(steps=steps, plan=plan)]

    def as_output(self, result: NDArray[np.float32], output_type: OutputType) -> Any:
        """x_0 `[B, C, H, W]` as the caller asked for it."""
        if output_type == "pil":
            from skipstep.images import to_pil

            return to_pil(result)
        if output_type == "pt":
            import torch

            return torch.from_numpy(result).to(self.device)
        return result

    def _miss(self, got: str) -> PlanNotFoundError:
        return PlanNotFoundError(
            got=got,
            expected=f"one of {', '.join(repr(p) for p in self.plans.values()) or 'none yet'}",
            remedy="call add_plan() first, or build the engine with compile_on_miss=True",
        )


def _check_output_type(output_type: str) -> None:
    if output_type not in get_args(OutputType):
        raise InputError(got=f"output_type={output_type!r}", expected="'np', 'pt' or 'pil'", remedy="pick one of these")


def check_finite(result: NDArray[np.float32]) -> None:
    """Raise NonFiniteError naming the samples of `[B, C, H, W]` that hold NaN or infinity."""
    # The step keeps NaN, so one look at the end sees every NaN that the network returned on the way.
    broken = np.flatnonzero(~np.isfinite(result).all(axis=(1, 2, 3)))
    if broken.size:
        raise NonFiniteError(
            got=f"NaN or infinity in samples {broken[:8].tolist()} of {len(result)}",
            expected="finite predictions from the network",
            remedy="check the weights and the inputs; a network that overflows in half precision needs float32",
        )
