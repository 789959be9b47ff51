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
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from skipstep import errors
from skipstep.errors import InputError, SkipstepError, check_integer, check_path, check_text, needs_packages
from skipstep.loading import LoadOptions
from skipstep.serving.batcher import Batcher
from skipstep.serving.requests import Limits, call_arguments, draw_rows
from skipstep.serving.shards import ShardWriter, verified_engine
from skipstep.storage.untrusted import parse_json

MAX_REQUEST_BYTES = 1 << 24
_STATUS = ((errors.QueueFullError, 503), (errors.DeadlineError, 504), (ValueError, 400), (LookupError, 400))
SAMPLE, ERROR = "sample", "error"


class Sampler:
    """For `ray.data.Dataset.map_batches`: rows of what `Engine.sample` takes (skipstep.serving.requests) get a sample.
    A block that is drawn again after a worker's death has the same rows, and so the same bits."""

    def __init__(self, bundle: str, network: str | None = None, **options: Unpack[LoadOptions]) -> None:
        self._engine = verified_engine(bundle, network, **options)

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {**batch, SAMPLE: draw_rows(self._engine, batch)}


class _Shards:
    """For map_batches: rows of a shard's number each; the worker draws and writes the shard."""

    def __init__(self, writer: ShardWriter) -> None:
        self._writer = writer

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        (shard,) = batch["shard"]
        try:
            done = self._writer(int(shard))
        except SkipstepError as error:  # Ray would wrap it in texts of its own.
            done = {ERROR: type(error).__name__, "got": error.got, "expected": error.expected, "remedy": error.remedy}
        return {name: np.array([value]) for name, value in done.items()}


def workers(bundle: str, num: int, *, network: str | None = None, **options: Unpack[LoadOptions]) -> dict[str, Any]:
    """The arguments of map_batches beside the class, for `num` engines; `options` are of skipstep.load. On the CPU each
    takes `num_threads` cores, 1 unless it is said, else a GPU."""
    share, resources = _shares(options)
    given = {"bundle": check_path("bundle", bundle), "network": network, **share}
    return {"fn_constructor_kwargs": given, **_compute(num), **resources}


def draw_with_ray(writer: ShardWriter, shards: list[int], *, address: str = "auto", num: int = 1) -> Iterator[Any]:
    """As draw_shards, by `num` workers of the cluster at `address`: its folder and bundle are on every machine.

    "auto" is the running cluster, and where there is none a new one on this machine, for loopback alone. A shard whose
    worker died is drawn again by another one. Raises InputError, DeviceUnavailableError.
    """
    ray = _ray()
    share, resources = _shares(writer.options)
    writer = replace(writer, options=share)
    connect(address, cores=num * resources.get("num_cpus", 1))
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    drawn = rows.map_batches(_Shards, fn_constructor_args=[writer], batch_size=1, **_compute(num), **resources)
    for row in drawn.iter_rows():
        if ERROR in row:
            raise getattr(errors, str(row[ERROR]))(**{name: str(row[name]) for name in ("got", "expected", "remedy")})
        yield {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}


def connect(address: str = "auto", *, cores: int = 1, **options: Any) -> None:
    """Join a cluster; `cores` of a new one, whatever this machine has. Further options are those of ray.init."""
    ray = _ray()
    if ray.is_initialized():
        return
    options = {"logging_level": "ERROR", "log_to_driver": False, **options}
    try:
        ray.init(address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address != "auto" or not isinstance(error, ConnectionError):
            raise errors.DeviceUnavailableError(
                got=f"no Ray cluster to join at {address} ({str(error)[:200]})",
                expected="the address of one that runs, such as 10.0.0.1:6379",
                remedy="start one there with the same Ray (ray start --head), or pass 'auto' where none runs",
            ) from error
        # Ray listens on loopback alone where it supports no clusters: so it is told here, in its own processes, too.
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
        os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
        options |= {"num_cpus": max(cores, os.cpu_count() or 1), "include_dashboard": False}
        ray.init("local", _node_ip_address="127.0.0.1", **options)


class SampleServer:
    """A Ray Serve deployment: an engine and its batcher. Handles call `sample`; HTTP takes a JSON object of the same
    names and returns the samples as a .npy file, or an object of `error` and `message`."""

    def __init__(self, bundle: str, limits: Limits, batcher: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self._engine, self._limits = verified_engine(bundle, None, **options), limits
        self._batcher = Batcher(self._engine, **batcher)

    async def sample(self, /, **fields: Any) -> NDArray[np.float32]:
        return np.asarray(await self._batcher.submit(**call_arguments(self._engine, fields, self._limits)))

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import Response

        try:
            samples = await self.sample(**await _fields(request))
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
    batcher: Any = None,
    served: Any = None,
    **options: Unpack[LoadOptions],
) -> Any:
    """An application for ray.serve.run. `batcher` are options of Batcher, `served` of serve.deployment
    (num_replicas and so on), further options those of skipstep.load."""
    _ray()
    from ray import serve

    share, resources = _shares(options)
    given = {"name": "skipstep", "ray_actor_options": resources, **(served or {})}
    return (
        serve.deployment(SampleServer)
        .options(**given)
        .bind(check_path("bundle", bundle), limits or Limits(), dict(batcher or {}), share)
    )


def status_of(error: SkipstepError) -> int:
    """HTTP's number for an error: the caller's, one of load, or the server's."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


async def _fields(request: Any) -> dict[str, Any]:
    """The JSON object of a request."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_REQUEST_BYTES:
            break
    fields = parse_json(bytes(body), "the request") if len(body) <= MAX_REQUEST_BYTES else None
    if isinstance(fields, dict):
        return fields
    expected = f'one such as {{"seeds": [1], "steps": 10}} of at most {MAX_REQUEST_BYTES} bytes'
    raise InputError(got="no JSON object, or too long a one", expected=expected, remedy="send such a one")


def _shares(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of skipstep.load for one of many on a machine, and what of Ray's resources that takes."""
    if check_text("device", options.get("device", "cpu")) != "cpu":
        return dict(options), {"num_gpus": 1}
    threads = options.get("num_threads")
    threads = 1 if threads is None else check_integer("num_threads", threads, low=1)
    return {**options, "num_threads": threads}, {"num_cpus": threads}


def _compute(num: int) -> dict[str, Any]:
    return {"compute": _ray().data.ActorPoolStrategy(size=check_integer("num", num, low=1, high=1 << 16))}


def _ray() -> Any:
    with needs_packages("ray with data and serve", remedy="pip install 'skipstep[ray]'"):
        import ray
        import ray.data
    return ray
