"""The engine: a network and the plans that were made for it, behind one call.

engine = Engine.build("checkpoint-folder", plans=[10, 20, 50], batch_sizes=[1, 16])
images = engine.sample(steps=20, seeds=[0, 1, 2, 3], output_type="pil")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from skipstep.backends import BackendName
from skipstep.batching import split_batch
from skipstep.errors import InputError, NonFiniteError, PlanError, PlanNotFoundError
from skipstep.images import to_pil
from skipstep.loop import Loop
from skipstep.network import NetworkSpec
from skipstep.plan import Plan
from skipstep.request import resolve_request
from skipstep.schedule import NoiseSchedule

OutputType = Literal["np", "pt", "pil"]
Progress = Callable[[int, int], None]


class Engine:
    """Samples by plan. Make one with `Engine.build`; calls from several threads are safe and take turns.

    `plans` and `batch_sizes` say what it holds, `backend`, `device` and `loop` which way it runs.
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
    ) -> None:
        self.network = network
        self.batch_sizes = tuple(sorted(batch_sizes))
        self.backend = backend
        self.device = device
        self.compile_on_miss = compile_on_miss
        self.plans: dict[str, Plan] = {}
        self.loops = loops
        self._plan_defaults = plan_defaults

    @classmethod
    def build(
        cls,
        model: Any,
        *,
        plans: Iterable[int | Plan],
        batch_sizes: Iterable[int] = (1,),
        backend: str = "auto",
        schedule: NoiseSchedule | None = None,
        prediction_type: str | None = None,
        sample_shape: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
        null_label: int | None = None,
        device: str = "auto",
        num_threads: int | None = None,
        compile_on_miss: bool = False,
    ) -> Engine:
        """Compile `model` for the given plans and batch sizes.

        model           a diffusers folder (path), or an nn.Module called as network(x [N, C, H, W], t [N], labels [N]);
                        a module is put into eval mode.
        plans           step counts, made into DDIM plans with what the folder's scheduler configuration says, or Plans.
        batch_sizes     the numbers of samples to compile for; requests of any size are split over them.
        backend         "torch", "onnxruntime" or "auto" (skipstep.backends.resolve_backend has the rule).
        schedule        overrides the folder's; needed for step counts where there is no scheduler configuration.
        prediction_type overrides the folder's; "epsilon" where neither says.
        sample_shape, num_classes, null_label
                        complete what the model's configuration does not say (skipstep.network.NetworkSpec).
        device          "cpu", "cuda", "cuda:1", or "auto": the GPU where there is one.
        num_threads     of ONNX Runtime; None leaves it to use every core. torch keeps its process-wide setting.
        compile_on_miss compile a plan that is asked for and not held, instead of raising PlanNotFoundError.

        Raises InputError, PlanError, ModelFormatError, ExportError, MissingDependencyError, DeviceUnavailableError.
        """
        from skipstep.build import build_network  # The only part that needs torch.

        sizes = _checked_batch_sizes(batch_sizes)
        built = build_network(
            model,
            batch_sizes=sizes,
            backend=backend,
            device=device,
            num_threads=num_threads,
            sample_shape=sample_shape,
            num_classes=num_classes,
            null_label=null_label,
        )
        defaults = dict(built.plan_defaults)
        if schedule is not None:
            defaults["schedule"] = schedule
        if prediction_type is not None:
            defaults["prediction_type"] = prediction_type
        engine = cls(
            built.network,
            loops=built.loops,
            batch_sizes=sizes,
            backend=built.backend,
            device=built.device,
            plan_defaults=defaults,
            compile_on_miss=compile_on_miss,
        )
        for plan in plans:
            engine.add_plan(plan)
        if not engine.plans and not compile_on_miss:
            raise PlanError(got="no plans", expected="at least one", remedy="pass plans=[20], or compile_on_miss=True")
        return engine

    def add_plan(self, plan: int | Plan, *, eta: float = 0.0) -> Plan:
        """Hold one more plan and return it; `eta` is that of a step count. Raises PlanError where it does not fit."""
        if not isinstance(plan, Plan):
            if "schedule" not in self._plan_defaults:
                raise PlanError(
                    got=f"the step count {plan!r} for a model without a scheduler configuration",
                    expected="a noise schedule",
                    remedy="pass schedule=, e.g. NoiseSchedule.linear(1000), or a Plan",
                )
            plan = Plan(**{**self._plan_defaults, "steps": plan, "eta": eta})
        trained = self._plan_defaults.get("prediction_type")
        if trained is not None and plan.prediction_type != trained:
            raise PlanError(
                got=f"a plan for {plan.prediction_type} prediction",
                expected=f"{trained}, which this network was trained to predict",
                remedy=f"make the plan with prediction_type={trained!r}",
            )
        self.plans[plan.key] = plan
        return plan

    def sample(
        self,
        *,
        steps: int | None = None,
        plan: Plan | None = None,
        seeds: int | Sequence[int] | None = None,
        x_T: Any = None,
        class_labels: int | Sequence[int] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        output_type: OutputType = "np",
        progress: Progress | None = None,
    ) -> Any:
        """Draw samples with the plan of `steps` steps, or with `plan`.

        seeds           an int for every sample, or one each, in [0, 2**64): a sample depends on its seed, not on its
                        place in the batch. They also key the noise of plans with eta > 0.
        x_T             `[B, C, H, W]` NumPy or torch, the initial noise instead of that of the seeds.
        class_labels    an int or one each; left out, a network with a null label draws unconditionally.
        guidance_scale  classifier-free guidance u + scale·(c - u); 1 is none. A number or one each.
        output_type     "np": float32 `[B, C, H, W]` in the network's range ([-1, 1] for pixels); "pt": the same as a
                        torch tensor; "pil": a list of 8-bit pictures.
        progress        called as progress(done, total), in network evaluations.

        Returns new memory every time. Raises InputError, PlanNotFoundError, and NonFiniteError where the network
        returned NaN.
        """
        if output_type not in ("np", "pt", "pil"):
            raise InputError(
                got=f"output_type={output_type!r}", expected="'np', 'pt' or 'pil'", remedy="pick one of these"
            )
        chosen = self.select_plan(steps=steps, plan=plan)
        request = resolve_request(
            self.network,
            seeds=seeds,
            x_T=x_T,
            class_labels=class_labels,
            guidance_scale=guidance_scale,
            adds_noise=chosen.flags.add_noise,
        )
        runs = split_batch(request.num_samples, self.batch_sizes)
        after_step = None if progress is None else _Counter(progress, len(runs) * chosen.num_evaluations)
        result = np.empty((request.num_samples, *self.network.sample_shape), np.float32)
        start = 0
        for size in runs:
            loop = self.loops[size if request.guidance is None else 2 * size]
            drawn = loop.run(chosen, request.chunk(start, size), after_step)
            result[start : start + size] = drawn[: request.num_samples - start]
            start += size
        _check_finite(result, chosen)
        if output_type == "pil":
            return to_pil(result)
        if output_type == "pt":
            import torch

            return torch.from_numpy(result).to(self.device)
        return result

    def select_plan(self, *, steps: int | None = None, plan: Plan | None = None) -> Plan:
        """The held plan with that step count, or the given one. Raises PlanNotFoundError, listing what is held."""
        if (steps is None) == (plan is None):
            raise InputError(
                got="neither steps nor plan" if steps is None else "both steps and plan",
                expected="one of them",
                remedy="pass steps=20, or plan=",
            )
        if plan is not None:
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
        guidance = ", with guidance" if self.network.null_label is not None else ""
        loop = next(iter(self.loops.values())).name
        return "\n".join(
            [
                f"network     {shape}, {classes}{guidance}",
                f"backend     {self.backend} on {self.device}",
                f"loop        {loop}",
                f"batch sizes {', '.join(map(str, self.batch_sizes))}",
                *(f"plan        {plan!r}" for plan in self.plans.values()),
            ]
        )

    def _miss(self, got: str) -> PlanNotFoundError:
        return PlanNotFoundError(
            got=got,
            expected=f"one of {', '.join(repr(p) for p in self.plans.values()) or 'none yet'}",
            remedy="call add_plan() first, or build the engine with compile_on_miss=True",
        )


class _Counter:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)


def _checked_batch_sizes(batch_sizes: Iterable[int]) -> tuple[int, ...]:
    sizes = tuple(batch_sizes)
    if not sizes or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in sizes):
        raise InputError(
            got=f"batch_sizes={list(sizes)!r}",
            expected="at least one integer ≥ 1",
            remedy="pass e.g. batch_sizes=[1, 16]; other request sizes are split over these",
        )
    return tuple(sorted(set(sizes)))


def _check_finite(result: NDArray[np.float32], plan: Plan) -> None:
    # The step keeps NaN, so one look at the end sees every NaN that the network returned on the way.
    broken = np.flatnonzero(~np.isfinite(result).all(axis=(1, 2, 3)))
    if broken.size:
        raise NonFiniteError(
            got=f"NaN or infinity in samples {broken[:8].tolist()} of {len(result)} after {plan!r}",
            expected="finite predictions from the network",
            remedy="check the weights and the inputs; a network that overflows in half precision needs float32",
        )
