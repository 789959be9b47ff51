"""Serving under load: all contenders serve the same arrivals with the same images, and each request counts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from serving_cases import serving_engine

from skipstep.bench import serving_load


@pytest.fixture(scope="module")
def engine():
    with serving_engine(batch_sizes=[1, 16]) as made:
        yield made


def test_all_contenders_draw_the_same_images(engine):
    requests = serving_load.random_requests(engine, (1, 4, 5), 60, np.random.default_rng(0))
    assert {"guidance_scale" in each for each in requests} == {True, False}
    for make in serving_load.contenders(engine).values():
        server = make()
        futures = [server.submit(**request) for request in requests]
        server.close()
        for request, future in zip(requests, futures, strict=True):
            np.testing.assert_array_equal(future.result(0), engine.sample(**request))


def test_whole_calls_share_a_call_only_with_their_like(engine, monkeypatch):
    sizes = []
    sample = engine.sample
    monkeypatch.setattr(
        engine, "sample", lambda **call: sizes.append((call["steps"], len(call["seeds"]))) or sample(**call)
    )
    server = serving_load.WholeCalls(engine, most=3, wait=60.0)
    futures = [server.submit(steps=steps, seeds=seed, class_labels=0) for seed, steps in enumerate((4, 5, 4, 5, 4, 4))]
    for future in (futures[0], futures[2], futures[4]):
        future.result(60.0)
    server.close()
    assert sizes == [(4, 3), (5, 2), (4, 1)]


def test_latency_counts_from_the_planned_arrival(engine):
    """A server that takes a tenth of a second for each of three requests that come at once."""

    class Slow(serving_load.WholeCalls):
        def _alike(self):
            serving_load.time.sleep(0.1)
            return super()._alike()

    requests = [{"steps": 1, "seeds": seed, "class_labels": 0} for seed in range(3)]
    latencies, rate = serving_load.serve(lambda: Slow(engine, most=1), requests, [0.0, 0.0, 0.0])
    assert [latency >= 0.1 * (place + 1) for place, latency in enumerate(latencies)] == [True] * 3
    assert latencies == sorted(latencies)
    assert rate == pytest.approx(3 / latencies[-1], rel=0.05)


@pytest.mark.slow
def test_the_command_writes_a_finding(tmp_path, monkeypatch):
    file = tmp_path / "load.json"
    monkeypatch.setattr(
        "sys.argv", ["serving_load", "--models", "tiny-architecture", "--scale", "0.1", "--out", str(file)]
    )
    serving_load.main()
    finding = json.loads(file.read_text())
    assert [row[:3] for row in finding["rows"]] == [
        ["tiny-architecture", load, name]
        for load in ("60%", "95%")
        for name in ("one call after the other", "whole calls in batches", "Batcher, all join", "Batcher")
    ]
    assert all(len(row) == len(finding["header"]) for row in finding["rows"])
    assert finding["command"] == "python -m skipstep.bench.serving_load --scale 0.1 --models tiny-architecture"
    assert "rows pay" in finding["note"]
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [line.points for line in serving_load.plot_of(finding["rows"]).lines] == [
        [(60.0, float(finding["rows"][place][4])), (95.0, float(finding["rows"][place + 4][4]))] for place in range(4)
    ]
