"""The step graph that ONNX Runtime has optimised: kept on disk, verified, and what happens where it is not whole."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import skipstep
from skipstep.backends import onnxruntime
from skipstep.bundles.cache import ArtefactCache
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import IntegrityError


@pytest.fixture
def cache(tmp_path, monkeypatch) -> ArtefactCache:
    """An empty one."""
    monkeypatch.setenv("SKIPSTEP_CACHE", str(tmp_path / "cache"))
    return ArtefactCache()


@pytest.fixture
def loaded(monkeypatch) -> list[str]:
    """How each step session was made."""
    seen, real = [], onnxruntime.make_session

    def made(model, **options):
        if not options.get("before_loop"):
            seen.append("kept" if options.get("optimised") else "optimised and kept" if options.get("written") else "")
        return real(model, **options)

    monkeypatch.setattr(onnxruntime, "make_session", made)
    return seen


def draw(bundle=SHIPPED_BUNDLE) -> np.ndarray:
    """Of one thread: no batch is divided, for which there would be another session."""
    with skipstep.load(bundle, backend="onnxruntime", num_threads=1, allow_hard_links=True) as engine:
        return engine.sample(steps=10, seeds=[1, 2], class_labels=[0, 1], guidance_scale=2.0)


def test_it_is_made_once_and_draws_the_same_bits(cache, loaded, monkeypatch):
    first = draw()
    assert [each.description for each in cache.entries()] == ["step graph, optimised by ONNX Runtime"]
    np.testing.assert_array_equal(draw(), first)
    assert loaded == ["optimised and kept", "kept"]
    # Another processor's or another version's is not this one's.
    monkeypatch.setattr(onnxruntime, "processor", lambda: "another")
    draw()
    monkeypatch.setattr(onnxruntime.onnxruntime, "__version__", "0")
    draw()
    assert loaded[2:] == ["optimised and kept"] * 2
    assert len(cache.entries()) == 3


def test_a_damaged_one_is_made_again(cache, loaded):
    first = draw()
    entry = next(cache.folder.glob("*.entry"))
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data)
    np.testing.assert_array_equal(draw(), first)
    assert loaded == ["optimised and kept"] * 2
    # Whole, and nothing that the runtime takes.
    key = cache.entries()[0].key
    cache.put(key, b"something else", "for a test")
    np.testing.assert_array_equal(draw(), first)
    assert loaded[2:] == ["kept", "optimised and kept"]


def test_a_harmed_bundle_is_refused_all_the_same(cache, tmp_path):
    draw()
    copy = shutil.copytree(SHIPPED_BUNDLE, tmp_path / "copy")
    graph = next(copy.rglob("step*.onnx"))
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(data)
    with pytest.raises(IntegrityError, match="step"):
        draw(copy)


def test_without_a_folder_to_keep_it_in_it_runs(monkeypatch, loaded, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("SKIPSTEP_CACHE", str(file))
    assert np.isfinite(draw()).all()
    assert loaded == ["optimised and kept"]
