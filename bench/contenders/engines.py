"""skipstep's engines, through the public API: on the CPU, and the loop forms of a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from skipstep import Engine, load
from skipstep.bench.contenders.workload import BuiltContender, Contender, Draw, Setup, Workload
from skipstep.bench.models import Subject


def build_engine(subject: Subject, setup: Setup, **options: Any) -> Engine:
    """From the folder; a bundle is loaded, and takes the plans that it lacks."""
    if subject.is_bundle:
        asked = {name: options[name] for name in ("backend", "precision") if name in options}
        engine = load(subject.path, num_threads=setup.threads, allow_hard_links=True, compile_on_miss=True, **asked)
        for plan in setup.plans:
            engine.add_plan(plan)
        return engine
    if setup.simulated:  # The loop forms of a GPU draw the bits of the host loop.
        options = {"backend": "torch", "loop": "stepwise"}
    elif setup.on_gpu:
        options["precision"] = setup.dtype
    return Engine.build(
        str(subject.path),
        plans=setup.plans,
        batch_sizes=setup.batch_sizes,
        device=setup.device,
        num_threads=setup.threads,
        **options,
    )


def _contender(
    name: str, lacks: Callable[[Subject, Setup], str | None], *, from_bundle: bool = False, **options: Any
) -> Contender:
    def build(subject: Subject, setup: Setup) -> BuiltContender:
        engine = build_engine(subject, setup, **options)

        def prepare(workload: Workload) -> Draw:
            x_T: Any = torch.from_numpy(workload.x_T).to(setup.torch_device) if setup.on_gpu else workload.x_T
            arguments: dict[str, Any] = {"plan": workload.plan, "x_T": x_T}
            if workload.labels is not None:
                arguments["class_labels"] = workload.labels.tolist()
            if workload.prompts is not None:
                arguments["prompt_embeds"] = workload.prompts
            output_type: Any = "pt" if setup.on_gpu else "np"
            return lambda: engine.sample(**arguments, output_type=output_type)

        def facts(workload: Workload) -> dict[str, Any]:
            reports = [asdict(each) for each in engine.captures] if setup.on_gpu else []
            size = workload.batch_size
            return {"captures": [each for each in reports if each["batch_size"] == size]} if reports else {}

        return BuiltContender(prepare, facts, engine.close)

    runs = {"precision": options.get("precision"), "backend": options["backend"]}
    return Contender(name, build, lacks, ours=True, from_bundle=from_bundle, **runs)


def _lacks(package: str, extra: str) -> Callable[[Subject, Setup], str | None]:
    def lacks(subject: Subject, setup: Setup) -> str | None:
        if setup.on_gpu or setup.dtype != "float32":
            return f"runs on the CPU beside float32; this run measures {setup.dtype} on {setup.device}"
        if importlib.util.find_spec(package) is None:
            return f"no package {package}: pip install 'skipstep[{extra}]'"
        return None

    return lacks


def _lacks_torch(subject: Subject, setup: Setup) -> str | None:
    if subject.is_bundle:
        return "a bundle holds no network that torch could run"
    return f"runs on the CPU; this run measures {setup.device}" if setup.on_gpu else None


def _lacks_gpu(subject: Subject, setup: Setup) -> str | None:
    if setup.simulated:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device that torch can see"
    if not setup.on_gpu:
        return f"runs on a GPU; this run measures {setup.device}"
    return "a bundle holds no network that torch could run" if subject.is_bundle else None


def _lacks_tensorrt(subject: Subject, setup: Setup) -> str | None:
    if importlib.util.find_spec("tensorrt") is None and importlib.util.find_spec("tensorrt_rtx") is None:
        return "no package tensorrt or tensorrt_rtx"
    return _lacks_gpu(subject, setup)


ENGINES = (
    _contender("skipstep", _lacks("onnxruntime", "cpu"), from_bundle=True, backend="onnxruntime", loop="stepwise"),
    _contender("skipstep-openvino", _lacks("openvino", "openvino"), from_bundle=True, backend="openvino"),
    _contender(
        "skipstep-openvino-bfloat16",
        _lacks("openvino", "openvino"),
        from_bundle=True,
        backend="openvino",
        precision="bfloat16",
    ),
    _contender("skipstep-torch", _lacks_torch, backend="torch", loop="stepwise"),
    _contender("skipstep-captured", _lacks_gpu, backend="torch", loop="captured"),
    _contender("skipstep-step-graph", _lacks_gpu, backend="torch", loop="step_graph"),
    _contender("skipstep-stepwise", _lacks_gpu, backend="torch", loop="stepwise"),
    _contender("skipstep-compiled", _lacks_gpu, backend="torch", loop="captured", compile_network=True),
    _contender("skipstep-tensorrt", _lacks_tensorrt, backend="tensorrt", loop="captured"),
)
