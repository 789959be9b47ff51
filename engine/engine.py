"""The engine: a network and the plans that were made for it, behind one call.

engine = Engine.build("checkpoint-folder", plans=[10, 20, 50], batch_sizes=[1, 16])
images = engine.sample(steps=20, seeds=[0, 1, 2, 3], output_type="pil")
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from skipstep.editing import ImageEditing
from skipstep.errors import InputError, PlanError
from skipstep.plan import Plan
from skipstep.schedule import NoiseSchedule


class Engine(ImageEditing):
    """A compiled sampler. `build` makes one; `sample` draws (skipstep.sampler); `invert`, `reconstruct`, `edit` and
    `interpolate` start from images or between noises (skipstep.editing)."""

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
        prompt_shape: tuple[int, int] | None = None,
        fractional_timesteps: bool | None = None,
        loop: str = "auto",
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
        sample_shape, num_classes, null_label, prompt_shape
                        complete what the model's configuration does not say (skipstep.network.NetworkSpec).
        device          "cpu", "cuda", "cuda:1", or "auto": the GPU where there is one.
        num_threads     of ONNX Runtime; None leaves it to use every core. torch keeps its process-wide setting.
        fractional_timesteps
                        whether the network takes timesteps between those of its training; None: a diffusers network
                        does if its time embedding is smooth, any other module does not.
        loop            "onnx", the whole loop as one graph (onnxruntime), "stepwise", or "auto": the first where it is
                        there. `describe()` says which.
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
            prompt_shape=prompt_shape,
            fractional_timesteps=fractional_timesteps,
            loop=loop,
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


def _checked_batch_sizes(batch_sizes: Iterable[int]) -> tuple[int, ...]:
    sizes = tuple(batch_sizes)
    if not sizes or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in sizes):
        raise InputError(
            got=f"batch_sizes={list(sizes)!r}",
            expected="at least one integer ≥ 1",
            remedy="pass e.g. batch_sizes=[1, 16]; other request sizes are split over these",
        )
    return tuple(sorted(set(sizes)))
