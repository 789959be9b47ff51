"""ONNX Runtime's device denoiser, in host memory: the same session, binding and copies, with the CPU's provider."""

from __future__ import annotations

from types import SimpleNamespace

import engine_builds
import numpy as np
import onnx
import onnxruntime
import pytest
import step_networks
import torch
from conftest import HAS_GPU
from faults import modules_after
from onnx import TensorProto, helper
from step_networks import SPEC, assert_predicts

from skipstep.backends import device_step, onnxruntime_cuda
from skipstep.backends.denoiser import Target
from skipstep.backends.onnxruntime import EarlyGraphs, make_session
from skipstep.backends.onnxruntime_cuda import (
    DeviceSession,
    HostInputs,
    OnnxRuntimeCudaDenoiser,
    StepTensor,
    denoisers,
    make_cuda_session,
)
from skipstep.calls.conditioning import PROMPTS, Conditioning
from skipstep.errors import DeviceUnavailableError, ExportError, MissingDependencyError
from skipstep.networks.spec import NetworkSpec

CPU = torch.device("cpu")


def host_session(precision="float32", **options) -> DeviceSession:
    return DeviceSession(make_session(step_networks.source().step_graph(precision)), CPU, **options)


def denoiser(batch_size=3, session=None, spec=SPEC) -> OnnxRuntimeCudaDenoiser:
    return OnnxRuntimeCudaDenoiser(session or host_session(), step_networks.early_graphs(), spec, batch_size=batch_size)


def test_the_network_of_these_tests_looks_up_every_kind():
    step_inputs = denoiser().step_inputs
    parts = step_networks.parts()
    assert all(parts.crossing.values())
    assert {name for name, each in step_inputs.items() if not each.per_stage} >= set(parts.crossing[2])
    assert {each.per_stage for each in step_inputs.values()} == {True, False}


@pytest.mark.parametrize("counted", [False, True], ids=["stage of the host", "stage of the device"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_predicts_what_the_cpu_backend_predicts(batch_size, counted):
    assert_predicts(denoiser(batch_size), step_networks.call(4, batch_size), counted=counted)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_what_stages_share_is_read_anew_when_it_moves(cuda_graph):
    """Several loops in turns, each with memory of its own; where a graph was recorded, nothing may be bound again."""
    network = denoiser(session=host_session(cuda_graph=cuda_graph))
    enqueue = network.new_context()
    for seed in (0, 1, 0):
        assert_predicts(network, step_networks.call(2, 3, seed), enqueue=enqueue)
    shared = {name for name, each in network.step_inputs.items() if not each.per_stage}
    assert network._read_in_place.keys() == (set() if cuda_graph else shared)


def test_half_precision():
    network = denoiser(session=host_session("float16"))
    assert network.input.dtype == network.output.dtype == torch.float16
    assert {each.dtype for each in network.step_inputs.values()} == {"float16"}
    assert_predicts(network, step_networks.call(3, 3), dtype=torch.float16)


def test_denoisers_of_one_session_record_graphs_of_their_own():
    session = host_session(cuda_graph=True)
    options = [denoiser(size, session)._options for size in (1, 2, 2)]
    assert [each.get_run_config_entry("gpu_graph_id") for each in options] == ["1", "2", "3"]
    assert all(each.get_run_config_entry("disable_synchronize_execution_providers") == "1" for each in options)


def test_why_it_is_not_recorded():
    assert "captures its own graphs" in denoiser().capture_refusal


class Stream:
    """Notes what waits for what."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))


@pytest.mark.parametrize("same", [False, True], ids=["another stream", "the session's stream"])
def test_order_between_streams(monkeypatch, same):
    log = []
    own, current = Stream("own", log), Stream("current", log)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: own if same else current)
    network = denoiser(session=host_session(stream=own))
    run = network._run
    monkeypatch.setattr(network, "_run", lambda: (log.append("run"), run()))
    assert_predicts(network, step_networks.call(1, 3))
    around = [("own", "waits for", "current"), "run", ("current", "waits for", "own")]
    assert log == (["run"] if same else around)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (NetworkSpec((2, 4, 5), 5, 5, prompt_shape=(3, 6)), r"sample float32 \[3, 2, 4, 4\].*\[3, 2, 4, 5\]"),
        (NetworkSpec((2, 4, 4), 5, 5, learns_variance=True), r"out_sample float32 \[3, 2, .*\[3, 4, 4, 4\]"),
    ],
)
def test_a_graph_of_another_network(spec, message):
    with pytest.raises(ExportError, match=message):
        denoiser(spec=spec)


def test_a_graph_of_another_batch_size():
    model = onnx.load_from_string(step_networks.parts().graphs.step)
    for each in (*model.graph.input, *model.graph.output):
        each.type.tensor_type.shape.dim[0].dim_value = 2
    session = DeviceSession(make_session(model.SerializeToString()), CPU)
    assert denoiser(2, session).batch_size == 2
    with pytest.raises(ExportError, match=r"\[2, 2, 4, 4\]; expected .*\[3, 2, 4, 4\].*for batch size 3"):
        denoiser(3, session)


def identity(dtype=TensorProto.FLOAT, name="sample", output="out_sample") -> bytes:
    """A graph that says back what it is given."""
    info = [helper.make_tensor_value_info(each, dtype, ("batch", 2, 4, 4)) for each in (name, output)]
    graph = helper.make_graph([helper.make_node("Identity", [name], [output])], "g", info[:1], info[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (identity(TensorProto.INT64), "sample of int64"),
        (identity(TensorProto.STRING), r"sample is tensor\(string\)"),
        (identity(name="x"), "inputs x and outputs out_sample; expected an input sample"),
        (identity(output="y"), "inputs sample and outputs y"),
    ],
)
def test_graphs_that_are_no_step_network(graph, message):
    with pytest.raises(ExportError, match=message):
        denoiser(session=DeviceSession(make_session(graph), CPU))


def test_parts_of_another_network_lack_what_the_step_looks_up():
    graphs = {name: graph for name, graph in step_networks.parts().graphs.before_loop.items() if name != "call"}
    with pytest.raises(ExportError, match=r"no value for .*, a step input of the network"):
        OnnxRuntimeCudaDenoiser(host_session(), EarlyGraphs(graphs, SPEC), SPEC, batch_size=3)


def test_a_graph_that_fails_while_it_runs():
    network = denoiser()
    given = step_networks.call(1, 3)
    looked_up = step_networks.tables(network.compute(*given[:2]), network.step_inputs)
    shared = next(name for name, each in network.step_inputs.items() if not each.per_stage)
    with pytest.raises(ExportError, match="failed on the device"):
        network.new_context()({**looked_up, shared: looked_up[shared][:2]}, 0)


class Counting(EarlyGraphs):
    """Counts how often it computes."""

    __slots__ = ("calls",)

    def compute(self, timesteps, conditioning):
        self.calls = getattr(self, "calls", 0) + 1
        return EarlyGraphs.compute(self, timesteps, conditioning)


@pytest.fixture
def host_inputs():
    source = Counting(step_networks.parts().graphs.before_loop, SPEC)
    inputs = {name: StepTensor((2, *each.shape), each.dtype) for name, each in denoiser(2).step_inputs.items()}
    counted = HostInputs(source, SPEC, inputs, batch_size=2)
    source.calls = 0
    return source, counted


def test_a_row_for_each_stage_and_sample(host_inputs):
    source, kept = host_inputs
    timesteps, conditioning, _ = step_networks.call(5, 2)
    stages = source.compute(timesteps, conditioning)
    values = kept.compute(timesteps, conditioning)
    for name, each in kept.step_inputs.items():
        value = values.expanded(name)
        for stage in range(5):
            table, rows = stages.row(name, stage)
            np.testing.assert_array_equal(value[stage] if each.per_stage else value, table[rows])


def test_what_was_computed_is_kept_for_a_while(host_inputs):
    source, kept = host_inputs
    calls = [step_networks.call(2, 2, seed)[:2] for seed in range(device_step._KEPT_RESULTS + 1)]
    first = kept.compute(*calls[0])
    again = kept.compute(*calls[0])
    assert source.calls == 1
    assert first is again
    for each in calls[1:]:
        kept.compute(*each)
    kept.compute(*calls[-1])
    assert source.calls == len(calls)
    kept.compute(*calls[0])
    assert source.calls == len(calls) + 1
    assert len(kept._kept) == device_step._KEPT_RESULTS


def test_other_conditioning_at_the_same_timesteps_is_another_call(host_inputs):
    source, kept = host_inputs
    timesteps, conditioning, _ = step_networks.call(2, 2)
    kept.compute(timesteps, conditioning)
    others = [
        Conditioning(conditioning.rows, 1 - conditioning.index),
        Conditioning({**conditioning.rows, PROMPTS: conditioning.rows[PROMPTS] + 1}, conditioning.index),
    ]
    for number, other in enumerate(others, 2):
        kept.compute(timesteps, other)
        assert source.calls == number


def test_results_too_large_to_keep(host_inputs, monkeypatch):
    source, kept = host_inputs
    small, large = step_networks.call(1, 2)[:2], step_networks.call(9, 2)[:2]
    size = device_step._num_bytes(kept.compute(*small))
    monkeypatch.setattr(device_step, "_KEPT_BYTES", size)
    kept.compute(*large)
    kept.compute(*large)
    assert source.calls == 3
    kept.compute(*small)
    assert source.calls == 3, "what is too large drives nothing else out"


def test_stored_tables_are_not_computed_again():
    timesteps = np.array([3.0, 500.0])
    tables = {timesteps.tobytes(): step_networks.early_graphs().tables_at(timesteps)}
    source = EarlyGraphs(step_networks.parts().graphs.before_loop, SPEC, tables=dict(tables))
    OnnxRuntimeCudaDenoiser(host_session(), source, SPEC, batch_size=2)
    assert "plan" not in source._sessions
    assert source.tables.keys() == tables.keys()


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it has the provider")
def test_a_build_without_the_provider():
    with pytest.raises(MissingDependencyError, match=r"without CUDAExecutionProvider.*skipstep\[gpu\]"):
        make_cuda_session(step_networks.parts().graphs.step, device=CPU)


@pytest.fixture
def with_provider(monkeypatch):
    """A build with the provider, on a machine with a device: what its sessions were made with."""
    made = {}

    def session(model, options, providers):
        if model == b"strange":
            raise RuntimeError("unknown operator")
        made["providers"] = providers
        return SimpleNamespace(get_providers=lambda: made.get("loaded", ["CUDAExecutionProvider"]))

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime_cuda, "cuda_device", lambda index: None)
    return made


def test_what_a_session_is_made_with(with_provider):
    stream = SimpleNamespace(cuda_stream=0x7F00)
    made = make_cuda_session(b"", device=torch.device("cuda", 1), stream=stream, cuda_graph=True)
    (name, options), fallback = with_provider["providers"]
    assert (name, fallback) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options == {"device_id": "1", "user_compute_stream": str(0x7F00), "enable_cuda_graph": "1", "use_tf32": "0"}
    assert (made.stream, made.cuda_graph) == (stream, True)


@pytest.mark.parametrize(
    ("precision", "decodes", "tf32"), [("float16", True, 1), ("float16", False, 0), ("float32", True, 0)]
)
def test_the_other_parts_of_a_pipeline_run_on_the_stream_of_the_loop(with_provider, precision, decodes, tf32):
    target = Target(device="cuda:0", precision=precision, stream=SimpleNamespace(cuda_stream=0x7F00))
    onnxruntime_cuda.part(b"", target, decodes=decodes, tiled=True)
    options = with_provider["providers"][0][1]
    assert (options["user_compute_stream"], options["use_tf32"]) == (str(0x7F00), str(tf32))


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="it has the provider")
def test_without_the_provider_they_run_on_the_cpu_and_say_so(caplog):
    graph = engine_builds.model(helper.make_node("Relu", ["x"], ["y"]))
    run = onnxruntime_cuda.part(graph, Target(device="cuda:0"), decodes=True, tiled=False)
    np.testing.assert_array_equal(run(["y"], {"x": np.float32([[-1, 0, 1, 2]])})["y"], [[0, 0, 1, 2]])
    assert "skipstep[gpu]" in caplog.text


def test_a_provider_that_does_not_load(with_provider):
    with_provider["loaded"] = ["CPUExecutionProvider"]
    with pytest.raises(DeviceUnavailableError, match="does not load; expected the CUDA and cuDNN libraries"):
        make_cuda_session(b"", device=CPU, stream=SimpleNamespace(cuda_stream=1))


@pytest.mark.usefixtures("with_provider")
def test_a_graph_that_the_provider_does_not_take():
    with pytest.raises(ExportError, match="does not take: unknown operator"):
        make_cuda_session(b"strange", device=CPU, stream=SimpleNamespace(cuda_stream=1))


@pytest.mark.skipif(HAS_GPU, reason="asks what happens without a CUDA device")
def test_the_provider_without_a_device(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(DeviceUnavailableError, match="expected a CUDA device"):
        make_cuda_session(b"", device=CPU)


def test_needs_no_cuda_to_be_imported():
    loaded = modules_after("import skipstep.backends.tensorrt, skipstep.backends.onnxruntime_cuda")
    assert not loaded & {"tensorrt", "tensorrt_rtx", "onnx", "triton"}


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_on_the_device(precision, cuda_graph):
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this build of ONNX Runtime has no CUDA provider")
    network = denoisers(step_networks.source(), Target("cuda:0", precision), cuda_graph=cuda_graph)(3)
    assert_predicts(network, step_networks.call(4, 3), dtype=getattr(torch, precision))
