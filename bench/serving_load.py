"""Serving under load: `python -m skipstep.bench.serving_load --out FILE`, about five minutes on two cores.

Single samples of several plans, half of them guided where the network can be, arrive at random (open loop, Poisson), at
shares of the rate that one call after the other can serve. The same arrivals are served by

    one call after the other    engine.sample, first come first served
    whole calls in batches      what waits for the same plan and guidance is drawn by one call of up to 16 samples; the
                                first waits up to 2 ms for others, as dynamic batching in Triton and Ray Serve does
    Batcher, all join           evaluations of up to 16 rows, without a cost model
    Batcher                     evaluations of as many rows as pay, by the calibration that is measured first

Latency is from the planned arrival to the image. p99 of fewer than 100 requests is the longest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skipstep import Engine, load
from skipstep.bench.models import open_subject
from skipstep.bench.page.plots import Line, Plot, to_png
from skipstep.bench.record import machine_class, write_finding
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.latency.calibration import nearest_rank
from skipstep.serving import Batcher
from skipstep.serving.cost import Cost

MAX_BATCH = 16
MAX_WAIT_MS = 2.0
ROLES = ("reference", "s1", "s2", "ours")  # Of the plot's colours, in the order of the contenders.
HEADER = ["model", "load", "served by", "p50 ms", "p99 ms", "requests/s", "p50 beside one call after the other"]
Request = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """A model, the step counts that requests draw from, the loads, and for how many seconds requests arrive at each;
    `sizes` and `seconds_to_calibrate` of the calibration."""

    model: str
    steps: tuple[int, ...]
    loads: tuple[float, ...]
    seconds: float
    sizes: tuple[int, ...] = (1, 2, 4, 8, 16)
    seconds_to_calibrate: float = 8.0


CASES = (
    Case("fashion-mnist", (5, 10, 20), (0.3, 0.6, 0.8, 0.95), 6.0),
    Case("cifar10-architecture", (2, 4), (0.6, 0.95), 12.0, (1, 2, 4)),
    Case("tiny-architecture", (5, 10, 20), (0.6, 0.95), 2.0, seconds_to_calibrate=2.0),
)


def open_engine(case: Case, folder: Path) -> Engine:
    if case.model == "fashion-mnist":
        engine = load(SHIPPED_BUNDLE, allow_hard_links=True, compile_on_miss=True)
    else:
        path = open_subject(case.model, folder=folder).path
        engine = Engine.build(
            str(path), plans=case.steps, batch_sizes=[1, MAX_BATCH], backend="onnxruntime", device="cpu"
        )
    for steps in case.steps:
        engine.add_plan(steps)
    return engine


class WholeCalls:
    """A worker that draws what waits for the same plan and guidance in one call of at most `most` samples."""

    def __init__(self, engine: Engine, *, most: int, wait: float = 0.0) -> None:
        self._engine, self._most, self._wait = engine, most, wait
        self._waiting: list[tuple[float, Request, Future[Any]]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._worker = threading.Thread(target=self._work)
        self._worker.start()

    def submit(self, **request: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._changed:
            self._waiting.append((time.monotonic(), request, future))
            self._changed.notify_all()
        return future

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.join()

    def _alike(self) -> list[tuple[float, Request, Future[Any]]]:
        kinds = [(each["steps"], "guidance_scale" in each) for _, each, _ in self._waiting]
        return [each for each, kind in zip(self._waiting, kinds, strict=True) if kind == kinds[0]][: self._most]

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if not self._waiting:
                    return
                left = self._waiting[0][0] + self._wait - time.monotonic()
                if self._most > 1 and left > 0.0:
                    self._changed.wait_for(lambda: self._closed or len(self._alike()) == self._most, left)
                batch = self._alike()
                self._waiting = [each for each in self._waiting if each not in batch]
            requests = [request for _, request, _ in batch]
            joined: Any = {name: [each[name] for each in requests] for name in requests[0] if name != "steps"}
            images = self._engine.sample(steps=requests[0]["steps"], **joined)
            for n, (_, _, future) in enumerate(batch):
                future.set_result(images[n : n + 1])


def contenders(engine: Engine) -> dict[str, Callable[[], Any]]:
    def all_join() -> Batcher:
        known, engine.calibration = engine.calibration, None
        try:
            return Batcher(engine, max_batch=MAX_BATCH, max_wait_ms=MAX_WAIT_MS, max_queue=1 << 20)
        finally:
            engine.calibration = known

    return {
        "one call after the other": lambda: WholeCalls(engine, most=1),
        "whole calls in batches": lambda: WholeCalls(engine, most=MAX_BATCH, wait=1e-3 * MAX_WAIT_MS),
        "Batcher, all join": all_join,
        "Batcher": lambda: Batcher(engine, max_batch=MAX_BATCH, max_wait_ms=MAX_WAIT_MS, max_queue=1 << 20),
    }


def random_requests(engine: Engine, steps: Sequence[int], count: int, rng: np.random.Generator) -> list[Request]:
    requests = []
    for seed in range(count):
        request: Request = {"steps": int(rng.choice(steps)), "seeds": seed}
        if engine.network.num_classes is not None:
            request["class_labels"] = int(rng.integers(engine.network.num_classes))
        if engine.network.can_guide and rng.random() < 0.5:
            request["guidance_scale"] = 2.0
        requests.append(request)
    return requests


def mean_seconds(engine: Engine, requests: Sequence[Request], seconds: float) -> float:
    """Of one call after the other: each kind of call as often as it occurs, at the median of its times."""
    kinds = {(each["steps"], "guidance_scale" in each): each for each in requests}
    times: dict[Any, list[float]] = {kind: [] for kind in kinds}
    for request in kinds.values():
        engine.sample(**request)
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or not all(times.values()):
        for kind, request in kinds.items():
            started = time.perf_counter()
            engine.sample(**request)
            times[kind].append(time.perf_counter() - started)
    return statistics.fmean(statistics.median(times[each["steps"], "guidance_scale" in each]) for each in requests)


def serve(make: Callable[[], Any], requests: Sequence[Request], arrivals: Sequence[float]) -> tuple[list[float], float]:
    """Seconds from each planned arrival to its image, and requests per second from the first arrival to the last."""
    server = make()
    done = [0.0] * len(requests)
    futures = []
    started = time.perf_counter()

    def note(place: int) -> Callable[[Future[Any]], None]:
        def at_end(future: Future[Any]) -> None:
            done[place] = time.perf_counter() - started

        return at_end

    for place, (request, arrival) in enumerate(zip(requests, arrivals, strict=True)):
        time.sleep(max(0.0, started + arrival - time.perf_counter()))
        futures.append(server.submit(**request))
        futures[-1].add_done_callback(note(place))
    server.close()
    for future in futures:
        future.result(0)
    latencies = [end - arrival for end, arrival in zip(done, arrivals, strict=True)]
    return latencies, len(requests) / (max(done) - arrivals[0])


def measure(case: Case, folder: Path, *, scale: float) -> tuple[list[list[str]], str]:
    """Rows of the table, and what an evaluation costs."""
    rng = np.random.default_rng(0)
    rows = []
    with open_engine(case, folder) as engine:
        engine.calibrate(
            plans=[case.steps[-1]],
            batch_sizes=case.sizes,
            repeats=20,
            max_seconds=scale * case.seconds_to_calibrate,
        )
        cost = Cost.of(engine.calibration, engine.plans)
        assert cost is not None, "several sizes were measured"
        sample = random_requests(engine, case.steps, 400, rng)
        capacity = 1.0 / mean_seconds(engine, sample, scale * case.seconds / 5)
        for load_share in case.loads:
            rate = load_share * capacity
            count = max(4, round(scale * case.seconds * rate))
            requests = random_requests(engine, case.steps, count, rng)
            arrivals = np.cumsum(rng.exponential(1.0 / rate, count)).tolist()
            base = 0.0
            for name, make in contenders(engine).items():
                latencies, served = serve(make, requests, arrivals)
                p50, p99 = (1e3 * nearest_rank(latencies, percent) for percent in (50, 99))
                base = base or p50
                cells = [f"{p50:.1f}", f"{p99:.1f}", f"{served:.1f}", f"{p50 / base:.2f}×"]
                rows.append([case.model, f"{load_share:.0%}", name, *cells])
                print(*rows[-1], sep="  ", flush=True)
        row_costs = ", ".join(f"{cost.ms(size) / size:.2f} at {size}" for size in cost.rows)
        return rows, (
            f"{case.model}: {capacity:.1f} calls/s one after the other, ms a row by rows of an evaluation {row_costs}; "
            f"up to {cost.paying_rows(MAX_BATCH)} rows pay."
        )


def plot_of(rows: Sequence[Sequence[str]]) -> Plot:
    """p99 by load for the first model of a table's rows."""
    of_model = [row for row in rows if row[0] == rows[0][0]]
    lines = [
        Line(
            name,
            role,
            marker,
            [(float(load.rstrip("%")), float(p99)) for _, load, by, _, p99, *_ in of_model if by == name],
        )
        for name, role, marker in zip(dict.fromkeys(row[2] for row in rows), ROLES, "s^Do", strict=True)
    ]
    ticks = [round(place) for place, _ in lines[0].points]
    title = f"Requests at random times: {rows[0][0]}"
    return Plot("serving-load", title, lines, "load, % of one call after the other", "p99, ms", log_y=True, ticks=ticks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[case.model for case in CASES])
    parser.add_argument("--scale", type=float, default=1.0, help="of the time that requests arrive for; default: 1")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    rows: list[list[str]] = []
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        for case in (case for case in CASES if case.model in options.models):
            found, note = measure(case, Path(folder), scale=options.scale)
            rows += found
            notes.append(note)
    command = f"python -m skipstep.bench.serving_load --scale {options.scale:g} --models {' '.join(options.models)}"
    note = " ".join([*notes, f"Machine class: {machine_class()}."])
    write_finding(options.out, command=command, header=HEADER, rows=rows, note=note)
    options.out.with_suffix(".png").write_bytes(to_png(plot_of(rows)))


if __name__ == "__main__":
    main()
