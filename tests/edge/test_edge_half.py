"""A network in float16 on a GPU without torch: the same bits as the host loop over the same network."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from edge_bundles import edge_bundle, load_edge

from skipstep.backends.onnxruntime import EarlyGraphs
from skipstep.bundles.bundle import open_bundle
from skipstep.calls.request import resolve_request
from skipstep.loops.stepwise import HostLoop
from skipstep.networks.graphs import SAMPLE
from skipstep.plans.stages import Stages

CALLS = {
    "one": {"seeds": [7], "class_labels": 3},
    "guided": {"seeds": [1, 2], "class_labels": [0, 5], "guidance_scale": 3.0},
    "rescaled": {"seeds": [1, 2], "class_labels": 4, "guidance_scale": [1.5, 6.0], "guidance_rescale": 0.7},
}


class HalfDenoiser:
    """skipstep.backends.denoiser.Denoiser, in host memory, its input and output in float16."""

    name = "float16"

    def __init__(self, session, early, spec, batch_size):
        self.batch_size, self.compute, self._session = batch_size, early.compute, session
        self.input = np.zeros((batch_size, *spec.sample_shape), np.float16)
        self.output = np.zeros((batch_size, *spec.output_shape), np.float16)

    def new_context(self):
        def enqueue(values, stage):
            given = {SAMPLE: self.input}
            for each in self._session.get_inputs():
                if each.name != SAMPLE:
                    table, rows = values.row(each.name, stage)
                    given[each.name] = table[rows].astype(np.float16 if "float16" in each.type else table.dtype)
            (self.output[...],) = self._session.run(None, given)

        return enqueue


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Of networks in eight bits, too, float16 goes in and out."""
    folder = tmp_path_factory.mktemp("half")
    return {name: edge_bundle(folder / name, precision=name) for name in ("float16", "int8")}


@pytest.fixture(scope="module")
def host(half):
    bundle = open_bundle(half["float16"])
    spec = bundle.manifest.network
    graphs = {name: bundle.read_graph(bundle.manifest.graphs[name]) for name in ("plan", "call")}
    early = EarlyGraphs(graphs, spec)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(bundle.read(bundle.manifest.engines[0].file), options)
    return HostLoop(lambda size: HalfDenoiser(session, early, spec, size), spec), spec


@pytest.mark.parametrize(("precision", "form"), [("float16", "captured"), ("int8", "stepwise")])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_in_float16_draws_the_host_loop_s_bits(cuda, half, host, call, precision, form):
    loop, spec = host
    with load_edge(half[precision], loop=form) as engine:
        assert engine.precision == precision
        drawn = engine.sample(steps=10, **CALLS[call])
        plan = engine.select_plan(steps=10)
    request = resolve_request(spec, **{"x_T": None, **CALLS[call]})
    out = np.empty_like(drawn)
    loop.enqueue(Stages.of([plan]), request, out).wait()
    assert np.array_equal(drawn, out)
