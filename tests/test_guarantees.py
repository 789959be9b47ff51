"""What a product relies on: bits that repeat, memory that stays, threads that end, and plans that travel."""

import copy
import gc
import logging
import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from engines import build
from tiny_networks import Curve, tiny_unet
from tolerances import BATCH_INVARIANCE

import skipstep
from skipstep import NoiseSchedule, Plan
from skipstep.calls.noise import sample_noise
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import EngineStateError
from skipstep.kernels.layout import Stream

UNET = {"num_classes": 3, "null_label": 3, "plans": [4]}
CALL = {"steps": 4, "class_labels": 1, "guidance_scale": 2.0}


@pytest.fixture(scope="module", params=["onnxruntime", "torch"])
def engine(request):
    with build(tiny_unet(num_class_embeds=4), backend=request.param, batch_sizes=[1, 2, 4], **UNET) as made:
        yield made


def test_a_call_repeats_to_the_bit(engine):
    first = engine.sample(seeds=range(4), **CALL)
    for _ in range(3):
        np.testing.assert_array_equal(engine.sample(seeds=range(4), **CALL), first)


def test_the_noise_of_a_seed_is_the_same_bits_in_any_batch(engine):
    together = sample_noise(engine.network, np.arange(7, dtype=np.uint64), Stream.INITIAL)
    for seed in range(7):
        alone = sample_noise(engine.network, np.array([seed], np.uint64), Stream.INITIAL)
        np.testing.assert_array_equal(together[seed], alone[0])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sample_is_its_seed_at_any_batch_size_to_a_tolerance(engine, size):
    together = engine.sample(seeds=range(4), **CALL)
    for start in range(0, 4, size):
        part = engine.sample(seeds=range(start, min(4, start + size)), **CALL)
        np.testing.assert_allclose(part, together[start : start + size], rtol=0, atol=BATCH_INVARIANCE)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_is_level_over_two_thousand_calls(engine):
    def calls(count):
        for i in range(count):
            engine.sample(seeds=range(i, i + 1 + i % 4), **CALL)
        gc.collect()

    calls(200)
    before = resident_bytes()
    calls(2000)
    assert resident_bytes() - before < 8 << 20


def threads_of_process() -> int:
    return len(os.listdir("/proc/self/task"))


def settled(threads: int) -> bool:
    """Whether the process comes down to so many threads: they end a moment after what they belong to."""
    for _ in range(100):
        gc.collect()
        if threads_of_process() <= threads:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "dropped"])
def test_no_thread_outlives_its_engine(closed):
    def use():
        engine = skipstep.load(SHIPPED_BUNDLE, allow_hard_links=True, num_threads=2)
        engine.sample_async(steps=10, seeds=[0, 1], class_labels=0).result()  # Two rows: a thread each.
        if closed:
            engine.close()

    use()
    before = threads_of_process()
    for _ in range(3):
        use()
    assert settled(before), [thread.name for thread in threading.enumerate()]


def key_and_rows(plan: Plan) -> tuple[str, bytes]:
    return plan.key, plan.coefficients.tobytes()


def test_plans_go_to_another_process():
    plan = Plan(
        schedule=NoiseSchedule.cosine(100), steps=7, solver="dpm_solver_pp_2m", clip="dynamic", dynamic_quantile=0.9
    )
    for again in (pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        assert again == plan
        assert key_and_rows(again) == key_and_rows(plan)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(key_and_rows, (plan,)) == key_and_rows(plan)


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_engines_stay_where_they_are(how):
    with build(Curve(), sample_shape=(1, 4, 4)) as engine, pytest.raises(EngineStateError, match=r"skipstep\.load"):
        how(engine)


def test_long_work_says_what_it_does(caplog, tmp_path):
    phases, saved = [], []
    with (
        caplog.at_level(logging.INFO, "skipstep"),
        build(tiny_unet(num_class_embeds=4), backend="onnxruntime", progress=phases.append, **UNET) as engine,
    ):
        engine.save(tmp_path / "bundle", license="none", progress=saved.append)
        engine.calibrate(repeats=3, max_seconds=0.1, batch_sizes=[1])
    said = [record.getMessage() for record in caplog.records if record.name == "skipstep"]
    assert len(phases) >= 3
    assert len(saved) >= 2
    assert [each for each in said if each in phases + saved] == phases + saved
    assert any("measure" in each for each in said)
