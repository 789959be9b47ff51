"""A real Ray cluster on this machine: bulk drawing, a worker that is killed, and Ray Serve; writes a finding.

build/ray/bin/python tests/serving/ray_run.py --num 2000 --out bench/results/findings/ray.json

Fails where a count or a bit is wrong.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray
from ray import serve

from skipstep import load
from skipstep.bench.record import machine_class, write_finding
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.serving.ray import Sampler, connect, deployment, draw_with_ray, workers
from skipstep.serving.shards import Drawing, ShardWriter, draw_shards

HEADER = ["run", "samples", "seconds", "samples/s", "peak MB of a worker", "equal bits"]
LINKED = {"allow_hard_links": True}


def read(folder: Path, drawing: Drawing) -> np.ndarray:
    """All samples by seed; fails unless every seed is there exactly once."""
    files = sorted(folder.glob("*.parquet"))
    assert len(files) == len(drawing)
    tables = [pq.read_table(file) for file in files]
    seeds = np.concatenate([table["seed"].to_numpy() for table in tables])
    assert collections.Counter(seeds.tolist()) == dict.fromkeys(range(drawing.num), 1)
    values = [np.stack(table["sample"].to_numpy()) for table in tables]
    return np.concatenate(values)[np.argsort(seeds)]


def bulk(drawing: Drawing, work: Path, counts: list[int]) -> tuple[list[list[str]], dict]:
    def writer(name: str) -> ShardWriter:
        (work / name).mkdir()
        return ShardWriter(str(SHIPPED_BUNDLE), str(work / name), drawing, {"num_threads": 1, **LINKED})

    def row(name: str, started: float, done: list[dict], folder: str) -> list[str]:
        wall, samples = time.perf_counter() - started, read(work / folder, drawing)
        assert np.array_equal(samples, expected)
        peak = max(each["peak_mb"] for each in done)
        cells = [f"{wall:.1f}", f"{drawing.num / wall:.1f}", f"{peak:.0f}"]
        return [name, str(drawing.num), *cells, "yes"]

    started = time.perf_counter()
    done = list(draw_shards(writer("alone"), range(len(drawing))))
    expected = read(work / "alone", drawing)
    rows = [row("one process", started, done, "alone")]
    for count in counts:
        started = time.perf_counter()
        done = list(draw_with_ray(writer(f"by-{count}"), list(range(len(drawing))), num=count))
        rows.append(row(f"Ray, {count} workers", started, done, f"by-{count}"))
        assert len({each["pid"] for each in done}) <= count

    # The worker of the first shard is killed while it draws another one.
    killed, started, done = None, time.perf_counter(), []
    for each in draw_with_ray(writer("killed"), list(range(len(drawing))), num=2):
        done.append(each)
        if killed is None:
            killed = each["pid"]
            os.kill(killed, signal.SIGKILL)
    assert sorted(each["shard"] for each in done) == list(range(len(drawing)))
    rows.append(row("Ray, 2 workers, one killed", started, done, "killed"))
    shards = collections.Counter(each["pid"] for each in done)
    log = {"killed": killed, "shards by worker": {str(pid): count for pid, count in shards.items()}}
    assert len(shards) >= 2
    assert not list((work / "killed").glob(".skipstep-*"))
    # Going on: a file that was lost and one that was half written are drawn again, the others are not.
    drawing.file(work / "killed", 0).unlink()
    (work / "killed" / f".skipstep-{'0' * 16}.partial").write_bytes(b"half")
    again = drawing.missing(work / "killed")
    assert again == [0]
    list(draw_with_ray(writer_at(work / "killed", drawing), again, num=1))
    assert np.array_equal(read(work / "killed", drawing), expected)
    assert not list((work / "killed").glob(".skipstep-*"))
    return rows, log


def writer_at(folder: Path, drawing: Drawing) -> ShardWriter:
    return ShardWriter(str(SHIPPED_BUNDLE), str(folder), drawing, {"num_threads": 1, **LINKED})


class Nothing:
    def __call__(self, batch: dict) -> dict:
        return batch


def overhead() -> float:
    """Milliseconds of Ray a batch: what 400 batches that compute nothing take longer than 100."""

    def seconds(num: int) -> float:
        rows = ray.data.from_items([{"shard": n} for n in range(num)], override_num_blocks=num)
        started = time.perf_counter()
        many = rows.map_batches(Nothing, batch_size=1, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1)
        assert sum(1 for _ in many.iter_rows()) == num
        return time.perf_counter() - started

    seconds(20)
    return 1e3 * (seconds(400) - seconds(100)) / 300


def rows_of_every_kind() -> int:
    """Plans and guidance mixed within a block."""
    num = 60
    seeds, steps = np.arange(num), np.where(np.arange(num) % 3 == 0, 10, 6)
    columns = [
        {"seeds": s, "steps": n, "class_labels": s % 10, "guidance_scale": 1.0 + s % 2}
        for s, n in zip(seeds, steps, strict=True)
    ]
    data = ray.data.from_items(columns, override_num_blocks=6)
    drawn = data.map_batches(Sampler, batch_size=10, **workers(SHIPPED_BUNDLE, 2, **LINKED)).take_all()
    with load(SHIPPED_BUNDLE, num_threads=1, **LINKED) as engine:
        for row in drawn:
            scale = row["guidance_scale"]
            alone = engine.sample(
                steps=int(row["steps"]),
                seeds=int(row["seeds"]),
                class_labels=int(row["class_labels"]),
                guidance_scale=scale,
            )
            assert np.allclose(row["sample"], alone[0], rtol=0, atol=1e-4), row["seeds"]
    assert sorted(row["seeds"] for row in drawn) == seeds.tolist()
    return num


def post(port: int, body: bytes) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", body, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def served(num: int = 20) -> dict[str, int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    handle = serve.run(deployment(SHIPPED_BUNDLE, **LINKED))
    with load(SHIPPED_BUNDLE, num_threads=1, **LINKED) as engine:
        futures = [handle.sample.remote(seeds=[n], steps=6, class_labels=[n % 10]) for n in range(num)]
        for n, future in enumerate(futures):
            alone = engine.sample(seeds=[n], steps=6, class_labels=[n % 10])
            assert np.allclose(future.result(), alone, rtol=0, atol=1e-4)
            status, body = post(port, json.dumps({"seeds": [n], "steps": 6, "class_labels": [n % 10]}).encode())
            assert status == 200
            assert np.allclose(np.load(io.BytesIO(body), allow_pickle=False), alone, rtol=0, atol=1e-4)
    refused = 0
    for wrong, words in (
        (b"{", "no JSON"),
        (b"[1]", "no JSON object"),
        (b'{"seeds": [1], "steps": 11}', "which no plan of this engine has"),
        (b'{"seeds": [1], "step": 6}', "'step' in a request"),
        (b'{"seeds": [-1], "steps": 6}', "seeds=-1"),
        (json.dumps({"seeds": list(range(65)), "steps": 6}).encode(), "a request for 65 samples"),
    ):
        status, body = post(port, wrong)
        assert (status, words in json.loads(body)["message"]) == (400, True), body
        refused += 1
    serve.shutdown()
    return {"by handle": num, "by HTTP": num, "refused": refused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with load(SHIPPED_BUNDLE, compile_on_miss=True, **LINKED) as engine:
        plan = engine.select_plan(steps=2)
        drawing = Drawing(engine.plans.network_digest, plan.key, 2, options.num, shard_size=options.num // 20)
    connect("auto", cores=4, object_store_memory=200 << 20)
    with tempfile.TemporaryDirectory() as work:
        rows, killed = bulk(drawing, Path(work), options.workers)
    a_batch, mixed, requests = overhead(), rows_of_every_kind(), served()
    counts = " ".join(map(str, options.workers))
    note = (
        f"Shipped model, 2 steps, shards of {drawing.shard_size} samples, workers of one thread. Killed worker: "
        f"{json.dumps(killed)}; nothing lost, nothing twice. Rows of mixed plans by map_batches: {mixed}. Ray Serve: "
        f"{json.dumps(requests)}, all as expected. Ray itself takes {a_batch:.0f} ms "
        f"a batch, beside {1e3 * float(rows[0][2]) / 20:.0f} ms of drawing. Ray {ray.__version__}, other work on "
        f"the two cores: load {os.getloadavg()[1]:.1f}. Machine class: {machine_class()}."
    )
    ray.shutdown()
    command = f"build/ray/bin/python tests/serving/ray_run.py --num {options.num} --workers {counts}"
    write_finding(options.out, command=command, header=HEADER, rows=rows, note=note)
    print(*rows, note, sep="\n")


if __name__ == "__main__":
    main()
