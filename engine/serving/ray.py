"""Ray: samples in bulk and behind requests, on as many machines as a cluster has.

rows.map_batches(Sampler, **workers("/models/my.bundle", 4))   # rows of seeds, steps, conditions → a column sample
serve.run(deployment("/models/my.bundle"))                     # Ray Serve, each replica a Batcher

Every worker loads the bundle from its own disk, or from one that all share, and verifies it. No port is opened here:
Ray's own are on loopback unless a cluster is told otherwise.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import (
    DeadlineError,
    DeviceUnavailableError,
    InputError,
    MissingDependencyError,
    QueueFullError,
    SkipstepError,
    check_integer,
)
from skipstep.serving.batcher import Batcher
from skipstep.serving.requests import Limits, call_arguments, draw_rows
from skipstep.serving.shards import ShardWriter, verified_engine
from skipstep.storage.untrusted import parse_json

MAX_REQUEST_BYTES = 1 << 24
SAMPLE = "sample"


class Sampler:
    """For `ray.data.Dataset.map_batches`: rows of what `Engine.sample` takes (skipstep.serving.requests) get a sample.

    A block that is drawn again after a worker's death has the same rows, and so the same bits.
    """

    def __init__(self, bundle: str, network: str | None = None, **options: Any) -> None:
        self._engine = verified_engine(bundle, network, **options)

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {**batch, SAMPLE: draw_rows(self._engine, batch)}


class _Shards:
    """For map_batches: rows of a shard's number each; the worker draws and writes the shard."""

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        done = [self._writer(int(shard)) for shard in batch["shard"]]
        return {name: np.array([each[name] for each in done]) for name in done[0]}


def workers(bundle: str, num: int, *, network: str | None = None, **options: Any) -> dict[str, Any]:
    """The arguments of map_batches beside the class: `num` workers with an engine each, with options of skipstep.load.

    On the CPU a worker takes `num_threads` cores, 1 unless it is said; on a GPU a whole one.
    """
    options = _with_threads(options)
    given = {"bundle": str(bundle), "network": network, **options}
    return {"fn_constructor_kwargs": given, **_compute(num), **_resources(options)}


def draw_with_ray(
    writer: ShardWriter, shards: list[int], *, address: str = "auto", num: int = 1
) -> Iterator[dict[str, Any]]:
    """As draw_shards, by `num` workers of the cluster at `address`: its folder and bundle are on every machine.

    "auto" is the running cluster, and where there is none a new one on this machine, for loopback alone. A shard whose
    worker died is drawn again by another one. Raises InputError, DeviceUnavailableError.
    """
    ray = _ray()
    writer.options = _with_threads(writer.options)
    connect(address, cores=num * writer.options["num_threads"] if _on_cpu(writer.options) else num)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    drawn = rows.map_batches(
        _Shards, fn_constructor_args=[writer], batch_size=1, **_compute(num), **_resources(writer.options)
    )
    for row in _own_errors(drawn.iter_rows()):
        yield {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}


def _own_errors(rows: Iterable[Any]) -> Iterator[Any]:
    """Raise an error of ours that a worker raised, without what Ray wraps it in."""
    try:
        yield from rows
    except Exception as error:
        inner: Any = error
        while inner is not None and not (
            isinstance(inner, SkipstepError) and type(inner).__module__.startswith("skip")
        ):
            inner = getattr(inner, "cause", None) or inner.__cause__
        if inner is None:
            raise
        raise inner from None


def connect(address: str = "auto", *, cores: int = 1, **options: Any) -> None:
    """Join a cluster; `cores` of a new one, whatever this machine has. Further options are those of ray.init."""
    ray = _ray()
    if ray.is_initialized():
        return
    options = {"logging_level": "ERROR", "log_to_driver": False, **options}
    try:
        ray.init(address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address != "auto":
            raise DeviceUnavailableError(
                got=f"no Ray cluster at {address} ({str(error)[:200]})",
                expected="the address of a cluster that runs, such as 10.0.0.1:6379",
                remedy="start one there (ray start --head), or leave the address out",
            ) from error
        # Ray listens on loopback alone where it supports no clusters: so it is told here, in its own processes, too.
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
        os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
        cores = max(cores, os.cpu_count() or 1)
        ray.init("local", num_cpus=cores, include_dashboard=False, _node_ip_address="127.0.0.1", **options)


class SampleServer:
    """A Ray Serve deployment: an engine and its batcher. Handles call `sample`; HTTP takes a JSON object of the same
    names and returns the samples as a .npy file, or an object of `error` and `message`."""

    def __init__(self, bundle: str, limits: Limits, batcher: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._engine, self._limits = verified_engine(bundle, None, **options), limits
        self._batcher = Batcher(self._engine, **batcher)

    async def sample(self, **fields: Any) -> NDArray[np.float32]:
        samples: NDArray[np.float32] = await self._batcher.submit(**call_arguments(self._engine, fields, self._limits))
        return samples

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import Response

        try:
            samples = await self.sample(**_fields(await _body(request)))
        except SkipstepError as error:
            words = {"error": type(error).__name__, "message": str(error)}
            return Response(json.dumps(words), status_of(error), media_type="application/json")
        out = io.BytesIO()
        np.save(out, samples, allow_pickle=False)
        return Response(out.getvalue(), media_type="application/x-npy")

    def __del__(self) -> None:
        if hasattr(self, "_batcher"):
            self._batcher.close()


def deployment(
    bundle: str,
    *,
    limits: Limits | None = None,
    batcher: Mapping[str, Any] | None = None,
    deployment_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """An application for ray.serve.run. `batcher` are options of Batcher, `deployment_options` of serve.deployment
    (num_replicas and so on), further options those of skipstep.load."""
    _ray()
    from ray import serve

    options = _with_threads(options)
    given = {"name": "skipstep", "ray_actor_options": _resources(options), **(deployment_options or {})}
    made = serve.deployment(SampleServer).options(**given)
    return made.bind(str(bundle), limits or Limits(), dict(batcher or {}), options)


def status_of(error: SkipstepError) -> int:
    """HTTP's number for an error: the caller's, one of load, or the server's."""
    if isinstance(error, QueueFullError):
        return 503
    if isinstance(error, DeadlineError):
        return 504
    return 400 if isinstance(error, ValueError | LookupError) else 500


async def _body(request: Any) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_REQUEST_BYTES:
            raise InputError(
                got="a longer request", expected=f"at most {MAX_REQUEST_BYTES} bytes", remedy="ask for fewer samples"
            )
    return bytes(body)


def _fields(body: bytes) -> dict[str, Any]:
    fields = parse_json(body, "the request")
    if not isinstance(fields, dict):
        raise InputError(got="no JSON object", expected='such as {"seeds": [1], "steps": 10}', remedy="send one")
    return fields


def _on_cpu(options: Mapping[str, Any]) -> bool:
    return bool(options.get("device", "cpu") == "cpu")


def _with_threads(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**({"num_threads": 1} if _on_cpu(options) else {}), **options}


def _resources(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_cpus": options["num_threads"]} if _on_cpu(options) else {"num_gpus": 1}


def _compute(num: int) -> dict[str, Any]:
    return {"compute": _ray().data.ActorPoolStrategy(size=check_integer("num", num, low=1, high=1 << 16))}


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError(
            got="Ray, which is not installed", expected="ray with data and serve", remedy="pip install 'skipstep[ray]'"
        ) from error
    return ray
