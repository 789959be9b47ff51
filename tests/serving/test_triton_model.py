"""The model of the server's Python backend: called as the server calls it, and under the real server (make outside)."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from skipstep import load
from skipstep.demo import SHIPPED_BUNDLE

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "build/triton-server/bin/python"


class Metric:
    def __init__(self, labels):
        self.labels, self.total = labels, 0.0

    def increment(self, by):
        self.total += by

    def value(self):
        return self.total


class Family:
    COUNTER = 0

    def __init__(self, name, words, kind):
        self.Metric = Metric


class Request(dict):
    """Inputs by name, and where a decoupled model sends its answer."""

    def get_response_sender(self):
        self.sent, self.done = [], threading.Event()
        return SimpleNamespace(send=lambda answer, flags: (self.sent.append((answer, flags)), self.done.set()))


def tensor_of(request, name):
    return SimpleNamespace(as_numpy=lambda: np.array(request[name])) if name in request else None


@pytest.fixture
def model(monkeypatch):
    """The class, over a stand-in for the server's own module."""
    server = SimpleNamespace(
        get_input_tensor_by_name=tensor_of,
        Tensor=lambda name, array: (name, array),
        InferenceResponse=lambda tensors, error=None: SimpleNamespace(tensors=tensors, error=error),
        TritonError=lambda words, code: SimpleNamespace(words=words, code=code),
        MetricFamily=Family,
        TRITONSERVER_RESPONSE_COMPLETE_FINAL="final",
    )
    for code in ("UNAVAILABLE", "INVALID_ARG", "INTERNAL"):
        setattr(server.TritonError, code, code)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    monkeypatch.delitem(sys.modules, "skipstep.serving.triton_model", raising=False)
    yield importlib.import_module("skipstep.serving.triton_model").TritonPythonModel()
    sys.modules.pop("skipstep.serving.triton_model", None)


def start(model, **config):
    names = ("seeds", "steps", "plan", "class_labels", "guidance_scale")
    config = {"max_batch_size": 4, "input": [{"name": name} for name in names], **config}
    config["parameters"] = {"bundle": {"string_value": str(SHIPPED_BUNDLE)}, "max_batch": {"string_value": "8"}}
    args = {"model_config": json.dumps(config), "model_repository": "/models/a", "model_version": "1"}
    model.initialize({**args, "model_name": "a", "model_instance_name": "a_0"})


def test_answers_are_the_engines_and_errors_are_ours(model):
    start(model)
    key = next(iter(model._engine.plans))
    right, by_key = Request(seeds=[1, 2], steps=[6, 6], class_labels=[3, 4]), Request(seeds=[5], plan=[key.encode()])
    wrong, many = Request(seeds=[1, 2], steps=[6, 10]), Request(seeds=[1] * 5, steps=[6] * 5)
    answers = model.execute([right, by_key, wrong, many])
    with load(SHIPPED_BUNDLE, num_threads=1) as engine:
        (name, samples), expected = answers[0].tensors[0], engine.sample(seeds=[1, 2], steps=6, class_labels=[3, 4])
        assert name == "samples"
        np.testing.assert_allclose(samples, expected, rtol=0, atol=1e-4)
        expected = engine.sample(seeds=[5], plan=engine.plans[key])
        np.testing.assert_allclose(answers[1].tensors[0][1], expected, rtol=0, atol=1e-4)
    for answer, words in ((answers[2], "one for all its samples"), (answers[3], "a request for 5 samples")):
        assert answer.error.code == "INVALID_ARG"
        assert words in answer.error.words
    assert {name: metric.value() for name, metric in model._metrics.items()} == {
        "requests": 2.0,
        "refused": 2.0,
        "evaluations": model._batcher.evaluations,
    }
    model.finalize()
    assert model.execute([right])[0].error.code == "INTERNAL"


def test_a_decoupled_model_answers_each_when_it_is_drawn(model):
    start(model, model_transaction_policy={"decoupled": True})
    requests = [Request(seeds=[n], steps=[6]) for n in range(3)] + [Request(seeds=[1])]
    assert model.execute(requests) is None
    assert all(request.done.wait(60) for request in requests)
    model.finalize()
    assert [[flags for _, flags in request.sent] for request in requests] == [["final"]] * 4
    assert [request.sent[0][0].error is None for request in requests] == [True, True, True, False]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not PYTHON.exists(), reason="make outside installs the server into build/triton-server")
def test_the_real_server(tmp_path):
    """Its own assertions: images, loopback alone, refusals, metrics, a stop under load; here that it got there."""
    out = tmp_path / "triton.json"
    command = [PYTHON, ROOT / "tests/serving/triton_run.py", "--requests", "40", "--out", out]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=580)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [row[1] for row in json.loads(out.read_text())["rows"]] == ["40", "40", "40", "4"]
