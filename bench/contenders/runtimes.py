"""The exported network, whole, in a runtime that a plain Python loop drives step by step: what people write themselves.

The loop is the paper's in NumPy; the network's timestep path is evaluated at every step, as it is in the graph.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.bench.contenders.workload import BuiltContender, Contender, Draw, Samples, Setup, Workload
from skipstep.bench.models import Subject
from skipstep.plans.plan import Plan

Network = Callable[[dict[str, Any]], Samples]


def ddim(network: Network, plan: Plan, x_t: Any, conditioning: dict[str, Any], timestep_dtype: Any) -> Samples:
    """The textbook's loop in NumPy. `network` takes the graph's inputs by name."""
    alpha_bar = plan.schedule.alpha_bar.astype(np.float32)
    for t, s in zip(plan.timesteps, (*plan.timesteps[1:], None), strict=True):
        a, p = alpha_bar[t], np.float32(plan.final_alpha_bar) if s is None else alpha_bar[s]
        timestep: NDArray[Any] = np.full(len(x_t), t, timestep_dtype)
        out: Any = network({"sample": x_t, "timestep": timestep, **conditioning})
        if plan.prediction_type == "v_prediction":
            x_0, eps = np.sqrt(a) * x_t - np.sqrt(1 - a) * out, np.sqrt(a) * out + np.sqrt(1 - a) * x_t
        elif plan.prediction_type == "sample":
            x_0, eps = out, (x_t - np.sqrt(a) * out) / np.sqrt(1 - a)
        else:
            x_0, eps = (x_t - np.sqrt(1 - a) * out) / np.sqrt(a), out
        if plan.clip is not None:
            x_0 = x_0.clip(-float(plan.clip), float(plan.clip))
        x_t = np.sqrt(p) * x_0 + np.sqrt(1 - p) * eps
    drawn: Samples = x_t
    return drawn


def build_onnxruntime(subject: Subject, setup: Setup) -> BuiltContender:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setup.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(subject.exported, options, providers=["CPUExecutionProvider"])
    return _built(subject, lambda workload: lambda given: session.run(None, given)[0])


def build_openvino(subject: Subject, setup: Setup, precision: str = "float32") -> BuiltContender:
    """With fixed shapes and the latency hint: what it is fastest with in that precision."""
    from skipstep.backends.openvino_library import HINTS, check_precision, core

    check_precision(precision)

    def network_for(workload: Workload) -> Network:
        model = core().read_model(subject.exported)
        model.reshape({each: [workload.batch_size, *list(each.partial_shape)[1:]] for each in model.inputs})
        request = (
            core()
            .compile_model(
                model,
                "CPU",
                {
                    "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_PRECISION_HINT": HINTS[precision],
                    "INFERENCE_NUM_THREADS": setup.threads,
                },
            )
            .create_infer_request()
        )

        def network(given: dict[str, Any]) -> Samples:
            request.infer(given, share_inputs=True)
            return np.asarray(request.get_output_tensor(0).data)

        return network

    return _built(subject, network_for)


def _built(subject: Subject, network_for: Callable[[Workload], Network]) -> BuiltContender:
    def prepare(workload: Workload) -> Draw:
        network, conditioning = network_for(workload), workload.conditioning()
        return lambda: ddim(network, workload.plan, workload.x_T, conditioning, subject.spec.timestep_dtype)

    return BuiltContender(prepare)


def build_network(subject: Subject, setup: Setup) -> BuiltContender:
    """The step network as often as a loop evaluates it, on the same random inputs, bound once: what a loop could at
    best take."""
    from skipstep.backends.onnxruntime import make_session
    from skipstep.export.partition import partition

    session = make_session(partition(subject.exported).graphs.step, num_threads=setup.threads)

    def prepare(workload: Workload) -> Draw:
        rng, size = np.random.default_rng(0), workload.batch_size
        arrays: dict[str, NDArray[Any]] = {}
        binding = session.io_binding()
        for each in session.get_inputs():
            shape = [size if isinstance(dim, str) else dim for dim in each.shape]
            array = arrays[each.name] = rng.standard_normal(shape, dtype=np.float32)
            binding.bind_input(each.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for each in session.get_outputs():
            array = arrays[each.name] = np.empty((size, *subject.spec.output_shape), np.float32)
            binding.bind_output(each.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

        def run() -> None:
            assert arrays  # The binding knows their addresses and does not keep them alive.
            for _ in range(workload.plan.num_evaluations):
                session.run_with_iobinding(binding)

        return run

    return BuiltContender(prepare)


def _lacks(package: str) -> Callable[[Subject, Setup], str | None]:
    def lacks(subject: Subject, setup: Setup) -> str | None:
        if importlib.util.find_spec(package) is None:
            return f"no package {package}: pip install {package}"
        if setup.on_gpu or setup.dtype != "float32":
            return f"driven on the CPU in float32 here; this run measures {setup.dtype} on {setup.device}"
        if subject.is_bundle:
            return "a bundle holds no network as it was exported"
        if any(plan.clip == "dynamic" for plan in setup.plans):
            return "the plain NumPy loop knows no dynamic thresholding"
        return None

    return lacks


RUNTIMES = (
    Contender("onnxruntime", build_onnxruntime, _lacks("onnxruntime"), needs_export=True),
    Contender("network", build_network, _lacks("onnxruntime"), needs_export=True, draws=False),
    Contender("openvino", build_openvino, _lacks("openvino"), needs_export=True),
    Contender(
        "openvino-bfloat16",
        partial(build_openvino, precision="bfloat16"),
        _lacks("openvino"),
        needs_export=True,
        precision="bfloat16",
    ),
)
