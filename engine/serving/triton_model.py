"""A model of NVIDIA's Triton Inference Server, for its Python backend: a bundle behind a batcher.

    NAME/config.pbtxt    inputs by the names of Engine.sample, one entry a sample (skipstep.export.triton_server)
    NAME/1/model.py      imports the class below

The server opens the ports, refuses larger batches than max_batch_size, and starts an instance for each of the instance
group. Before an instance is ready it has verified the bundle and drawn its golden samples, which also warms it up.
Where the model is decoupled, requests join the evaluations under way; else those that the server's dynamic batching
brings together share theirs. Parameters of config.pbtxt, all text:

    bundle             its folder, relative to the version's: each version has a bundle of its own
    num_threads        of each instance; max_batch, max_wait_ms, max_queue  of its Batcher
    require_signature  the public key that must have signed the bundle
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as server  # The server's own module, there while it runs a model.

from skipstep import load
from skipstep.bundles.bundle import open_bundle
from skipstep.bundles.golden import replay_golden
from skipstep.errors import InputError, QueueFullError, SkipstepError, shown
from skipstep.serving.batcher import Batcher
from skipstep.serving.requests import PLAN_NAMES, Limits, call_arguments

OUTPUT = "samples"
_BATCHER = {"max_batch": int, "max_wait_ms": float, "max_queue": int}


class TritonPythonModel:
    """Made, called and ended by the server. What a request asks wrongly is answered with our error's words."""

    def initialize(self, args: Mapping[str, str]) -> None:
        config = json.loads(args["model_config"])
        said = {name: each["string_value"] for name, each in config.get("parameters", {}).items()}
        bundle = (Path(args["model_repository"]) / args["model_version"] / said["bundle"]).resolve()
        signer = said.get("require_signature")
        self._engine = load(bundle, num_threads=int(said.get("num_threads", 1)), require_signature=signer)
        opened = open_bundle(bundle, require_signature=signer)
        golden = opened.manifest.golden
        replay_golden(self._engine, golden, opened.read_arrays(golden.file))
        batcher = {name: kind(said[name]) for name, kind in _BATCHER.items() if name in said}
        self._batcher: Batcher = Batcher(self._engine, **batcher)
        self._limits = Limits(samples=max(1, config["max_batch_size"]))
        self._inputs = [each["name"] for each in config["input"]]
        self._decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)
        labels = {
            "model": args["model_name"],
            "version": args["model_version"],
            "instance": args["model_instance_name"],
        }
        self._families, self._metrics = [], {}
        for name, words in (("requests", "answered"), ("refused", "answered with an error"), ("evaluations", "done")):
            family = server.MetricFamily(f"skipstep_{name}", f"{name} {words}", server.MetricFamily.COUNTER)
            self._families.append(family)  # A metric goes with its family.
            self._metrics[name] = family.Metric(labels=labels)

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        futures = [self._submitted(request) for request in requests]
        if not self._decoupled:
            return [self._answer(future) for future in futures]
        for request, future in zip(requests, futures, strict=True):
            future.add_done_callback(partial(self._send, request.get_response_sender()))
        return None

    def finalize(self) -> None:
        self._batcher.close()
        self._engine.close()

    def _submitted(self, request: Any) -> Future[Any]:
        """The future of a request's samples, or of the error in its arguments."""
        try:
            arguments = call_arguments(self._engine, self._fields(request), self._limits)
            return self._batcher.submit(**arguments)
        except Exception as error:
            failed: Future[Any] = Future()
            failed.set_exception(error)
            return failed

    def _fields(self, request: Any) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name in self._inputs:
            tensor = server.get_input_tensor_by_name(request, name)
            if tensor is not None:
                values = tensor.as_numpy()
                fields[name] = _one(name, values) if name in PLAN_NAMES else values
        return fields

    def _answer(self, future: Future[Any]) -> Any:
        try:
            samples = future.result()
            self._count("requests", 1)
            return server.InferenceResponse([server.Tensor(OUTPUT, samples)])
        except Exception as error:
            self._count("refused", 1)
            return server.InferenceResponse([], server.TritonError(_words(error), _code(error)))
        finally:
            evaluations = self._metrics["evaluations"]
            self._count("evaluations", max(0.0, self._batcher.evaluations - evaluations.value()))

    def _send(self, sender: Any, future: Future[Any]) -> None:
        sender.send(self._answer(future), flags=server.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _count(self, name: str, by: float) -> None:
        self._metrics[name].increment(by)


def _one(name: str, values: Any) -> Any:
    """What all samples of a request share."""
    found = {each.decode(errors="replace") if isinstance(each, bytes) else each for each in np.ravel(values).tolist()}
    if len(found) != 1:
        raise InputError(
            got=f"{name} of {shown(sorted(found))} in one request",
            expected="one for all its samples",
            remedy="send a request for each",
        )
    return found.pop()


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _code(error: Exception) -> Any:
    if isinstance(error, QueueFullError):
        return server.TritonError.UNAVAILABLE
    wrong = isinstance(error, SkipstepError) and isinstance(error, ValueError | LookupError)
    return server.TritonError.INVALID_ARG if wrong else server.TritonError.INTERNAL
