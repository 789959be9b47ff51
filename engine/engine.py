"""The engine: a network and the plans that were made for it, behind one call.

engine = Engine.build("checkpoint-folder", plans=[10, 20, 50], batch_sizes=[1, 16])
images = engine.sample(steps=20, seeds=[0, 1, 2, 3], output_type="pil")
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Unpack

from skipstep.errors import InputError, PlanError
from skipstep.latency.tuning import Tuning
from skipstep.plans.plan import Plan
from skipstep.plans.schedule import NoiseSchedule

if TYPE_CHECKING:
    from skipstep.building import BuildOptions, BuiltNetwork


class Engine(Tuning):
    """A compiled sampler. `build` makes one; `sample` draws; `invert`, `reconstruct`, `edit` and
    `interpolate` start from images or between noises; `calibrate` and `autotune` measure it here
    (skipstep.latency.tuning); `save` makes a bundle, which `skipstep.load` opens."""

    _built: BuiltNetwork | None = None

    @classmethod
    def build(
        cls,
        model: Any,
        *,
        plans: Iterable[int | Plan],
        batch_sizes: Iterable[int] = (1,),
        schedule: NoiseSchedule | None = None,
        prediction_type: str | None = None,
        compile_on_miss: bool = False,
        **options: Unpack[BuildOptions],
    ) -> Engine:
        """Compile `model` for the given plans and batch sizes.

        model           a diffusers folder (path), or an nn.Module called as network(x [N, C, H, W], t [N], labels [N]);
                        a module is put into eval mode.
        plans           step counts, made into DDIM plans with what the folder's scheduler configuration says, or Plans.
        batch_sizes     the numbers of samples to compile for; requests of any size are split over them.
        schedule        overrides the folder's; needed for step counts where there is no scheduler configuration.
        prediction_type overrides the folder's; "epsilon" where neither says.
        compile_on_miss compile a plan that is asked for and not held, instead of raising PlanNotFoundError.
        options         backend, loop, device and so on: skipstep.building.BuildOptions.

        Raises InputError, PlanError, ModelFormatError, ExportError, MissingDependencyError, DeviceUnavailableError.
        """
        from skipstep.building import build_network  # The only part that needs torch.

        sizes = _checked_batch_sizes(batch_sizes)
        built = build_network(model, batch_sizes=sizes, **options)
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
            any_batch=built.any_batch,
            precision=built.precision,
            num_threads=options.get("num_threads"),
            lifecycle=built.lifecycle,
            lane=built.lane,
        )
        for plan in plans:
            engine.add_plan(plan)
        if not engine.plans and not compile_on_miss:
            raise PlanError(got="no plans", expected="at least one", remedy="pass plans=[20], or compile_on_miss=True")
        engine.prepare()
        engine._built = built
        return engine

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        license: str,
        name: str | None = None,
        targets: Iterable[str] = ("cpu",),
        precision: str = "float32",
        overwrite: bool = False,
        sign_key: str | os.PathLike[str] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Write what this engine is, with its plans, as a bundle that `skipstep.load` runs without torch.

        license     of the weights, as an SPDX expression or in words: it travels with them.
        name        of the model; the checkpoint folder's or the module's class where left out.
        targets     "cpu"; "rtx:sm86" and the like; "sm_87" for step kernels; "tensorrt" for the graph that skipstep
                    build makes an engine of on its device; "onnx-loop" for each plan's whole loop as one ONNX graph;
                    "server" for a Triton Inference Server repository (skipstep.export.targets).
        precision   of the network for GPUs: "float32", "float16" or "bfloat16". The CPU's is float32.
        sign_key    an Ed25519 private key to sign the manifest with (skipstep.storage.signature).

        The bundle is loaded and draws the golden samples again before it takes its name; an existing one is replaced
        only with `overwrite`, and only by a whole one. Raises ExportError, StorageError, InputError.
        """
        from skipstep.export.bundle_writer import BundleRequest, write_bundle
        from skipstep.loading import load

        if self._built is None:
            raise InputError(
                got="an engine that was loaded from a bundle",
                expected="one that was built from a model",
                remedy="copy the bundle's folder, or build the engine from the model",
            )
        request = BundleRequest(
            name=name or self._built.name,
            license=license,
            targets=tuple(targets),
            precision=precision,
            overwrite=overwrite,
            sign_key=sign_key,
            calibration=self.calibration,
        )
        write_bundle(self, self._built.parts(), path, request, open_again=load, progress=progress)


def _checked_batch_sizes(batch_sizes: Iterable[int]) -> tuple[int, ...]:
    sizes = tuple(batch_sizes)
    if not sizes or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in sizes):
        raise InputError(
            got=f"batch_sizes={list(sizes)!r}",
            expected="at least one integer ≥ 1",
            remedy="pass e.g. batch_sizes=[1, 16]; other request sizes are split over these",
        )
    return tuple(sorted(set(sizes)))
