"""Bulk drawing: many samples as numbered files, each whole or absent, by this process or by several.

    FOLDER/draw.json              what is drawn, so that another call goes on with the same
    FOLDER/00000.parquet, …       or .tar: a run of consecutive seeds each

A sample is its seed, and every worker draws a shard in the same batches, so a shard that is drawn again has the
same bits.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skipstep.calls.images import to_pil
from skipstep.engine import Engine
from skipstep.errors import (
    EngineStateError,
    InputError,
    IntegrityError,
    check_choice,
    check_integer,
    check_text,
    optional_package,
)
from skipstep.loading import load
from skipstep.serving.requests import call_arguments
from skipstep.storage.atomic import atomic_write, check_writable, storage_errors
from skipstep.storage.verified import read_regular

FORMATS = ("parquet", "tar")
MAX_SHARD_BYTES = 1 << 30
_NAME = "draw.json"


@dataclass(frozen=True, slots=True)
class Drawing:
    """Seeds first_seed … first_seed + num - 1 with one plan. Sample i has the label labels[i modulo their number].

    `network`: sha256 of the network, which every worker's bundle must hold.
    """

    network: str | None
    plan: str
    steps: int
    num: int
    first_seed: int = 0
    shard_size: int = 500
    labels: tuple[int, ...] | None = None
    guidance_scale: float | None = None
    format: str = "parquet"

    def __post_init__(self) -> None:
        check_integer("num", self.num, low=1, high=1 << 40)
        check_integer("first_seed", self.first_seed, low=0, high=2**64 - self.num)
        check_integer("shard_size", self.shard_size, low=1, high=1 << 20)
        check_choice("format", self.format, FORMATS)
        if self.format == "parquet":
            _pyarrow()

    def __len__(self) -> int:
        return -(-self.num // self.shard_size)

    def file(self, folder: str | os.PathLike[str], shard: int) -> Path:
        return Path(folder) / f"{shard:05d}.{self.format}"

    def missing(self, folder: str | os.PathLike[str]) -> list[int]:
        """The shards that are still to be drawn. Raises InputError for a folder of another drawing."""
        check_writable(folder)
        path, data = Path(folder) / _NAME, (json.dumps(asdict(self), indent=1) + "\n").encode()
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            found = read_regular(path, 1 << 24) if path.exists() else None
        if found is None:
            atomic_write(path, data)
        elif found != data:
            raise InputError(
                got=f"{folder}, which holds another drawing",
                expected=f"the one that its {_NAME} describes, or an empty folder",
                remedy="pass the same options as before, or another folder",
            )
        return [shard for shard in range(len(self)) if not self.file(folder, shard).exists()]


@dataclass(slots=True)
class ShardWriter:
    """Draws shards of a drawing into a folder, with an engine from a bundle that is verified. Makes no plans: only
    those of the bundle, and that of the drawing's step count."""

    bundle: str
    folder: str
    drawing: Drawing
    options: Mapping[str, Any]
    engine: Engine | None = None

    def __call__(self, shard: int) -> dict[str, Any]:
        """Draw and write one shard; says what it took."""
        if self.engine is None:
            self.engine = verified_engine(self.bundle, self.drawing.network, compile_on_miss=True, **self.options)
        job, started = self.drawing, time.perf_counter()
        indices = range(shard * job.shard_size, min(job.num, (shard + 1) * job.shard_size))
        size = 4 * len(indices) * int(np.prod(self.engine.network.sample_shape, dtype=np.int64))
        if size > MAX_SHARD_BYTES:
            raise InputError(
                got=f"shards of {size} bytes", expected=f"at most {MAX_SHARD_BYTES}", remedy="pass a smaller shard size"
            )
        seeds = [job.first_seed + index for index in indices]
        labels = None if job.labels is None else [job.labels[index % len(job.labels)] for index in indices]
        which = {"plan": job.plan} if job.plan in self.engine.plans else {"steps": job.steps}
        arguments = call_arguments(self.engine, {"seeds": seeds, **which})
        samples = self.engine.sample(**arguments, class_labels=labels, guidance_scale=job.guidance_scale)
        drawn = time.perf_counter() - started
        encode = _parquet if job.format == "parquet" else _tar
        atomic_write(job.file(self.folder, shard), encode(job, seeds, labels, samples))
        return {
            "shard": shard,
            "samples": len(seeds),
            "sampling": drawn,
            "seconds": time.perf_counter() - started,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # Linux counts in KiB.
            "pid": os.getpid(),
        }


def draw_shards(writer: ShardWriter, shards: Iterable[int], *, workers: int = 1) -> Iterator[dict[str, Any]]:
    """Draw them on this machine, in this process or in several; yields what the writer says, in order of completion."""
    if workers == 1:
        yield from map(writer, shards)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(writer,)) as pool:
        try:
            for done in as_completed([pool.submit(_continue, shard) for shard in shards]):
                yield done.result()
        except BrokenProcessPool as error:
            raise EngineStateError(
                got="a worker process that was ended",
                expected=f"{workers} that live until the last shard",
                remedy="draw into the same folder again, which goes on there; with fewer workers if memory is short",
            ) from error


def verified_engine(bundle: str, network: str | None, *, compile_on_miss: bool = False, **options: Any) -> Engine:
    """The engine of a bundle, whose files are verified. Raises IntegrityError for another network than the caller's."""
    engine = load(bundle, compile_on_miss=compile_on_miss, **options)
    if network is not None and engine.plans.network_digest != check_text("network", network):
        engine.close()
        raise IntegrityError(
            got=f"another network in {bundle}",
            expected=f"that of sha256 {network[:12]}…",
            remedy="copy the same bundle to every machine, to the same path",
        )
    return engine


_in_this_process: list[ShardWriter] = []


def _begin(writer: ShardWriter) -> None:
    _in_this_process[:] = [writer]


def _continue(shard: int) -> dict[str, Any]:
    return _in_this_process[0](shard)


def _parquet(job: Drawing, seeds: list[int], labels: list[int] | None, samples: NDArray[np.float32]) -> bytes:
    """Columns seed, class_label and sample, the numbers of one sample in a row; the shape is in the metadata."""
    pa = _pyarrow()
    import pyarrow.parquet as pq

    flat = pa.FixedSizeListArray.from_arrays(pa.array(samples.reshape(-1)), samples[0].size)
    columns = {"seed": pa.array(seeds, pa.uint64()), "sample": flat}
    if labels is not None:
        columns["class_label"] = pa.array(labels, pa.int64())
    facts = {"skipstep": json.dumps({**asdict(job), "shape": samples.shape[1:]})}
    out = pa.BufferOutputStream()
    pq.write_table(pa.table(columns).replace_schema_metadata(facts), out, compression="zstd")
    data: bytes = out.getvalue().to_pybytes()
    return data


def _tar(job: Drawing, seeds: list[int], labels: list[int] | None, samples: NDArray[np.float32]) -> bytes:
    """As WebDataset reads it: SEED.npy, SEED.cls, and SEED.png where a sample is a picture."""
    out = io.BytesIO()
    pictures = to_pil(samples) if samples.ndim == 4 and samples.shape[1] in (1, 3) else None
    with tarfile.open(fileobj=out, mode="w") as archive:
        for index, seed in enumerate(seeds):
            files: dict[str, bytes] = {}
            content = io.BytesIO()
            np.save(content, samples[index], allow_pickle=False)
            files["npy"] = content.getvalue()
            if pictures is not None:
                content = io.BytesIO()
                pictures[index].save(content, "png")
                files["png"] = content.getvalue()
            if labels is not None:
                files["cls"] = str(labels[index]).encode()
            for kind, data in files.items():
                entry = tarfile.TarInfo(f"{seed:020d}.{kind}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _pyarrow() -> Any:
    remedy = "pip install pyarrow, or choose the format tar"
    return optional_package("pyarrow", use="writes Parquet", remedy=remedy)
