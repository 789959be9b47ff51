"""Shards of a drawing: the same bits whoever draws them, whole or absent, and none drawn twice."""

from __future__ import annotations

import io
import os
import signal
import tarfile

import numpy as np
import pytest

from skipstep import load
from skipstep.commands.main import main
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.errors import EngineStateError, InputError, IntegrityError
from skipstep.serving import shards
from skipstep.serving.shards import Drawing, ShardWriter, draw_shards, verified_engine

OPTIONS = {"num_threads": 1, "allow_hard_links": True}


def drawing(**changes):
    with load(SHIPPED_BUNDLE, **OPTIONS) as engine:
        plan = engine.select_plan(steps=6)
        given = {"num": 11, "shard_size": 4, "labels": (3, 5, 7), "format": "tar", **changes}
        return Drawing(engine.plans.network_digest, plan.key, 6, **given)


def writer(folder, job):
    return ShardWriter(str(SHIPPED_BUNDLE), str(folder), job, OPTIONS)


def samples(file):
    with tarfile.open(file) as archive:
        found = {each.name: archive.extractfile(each).read() for each in archive}
    assert all(found[name.replace("npy", "png")].startswith(b"\x89PNG") for name in found if name.endswith("npy"))
    return {
        int(name[:-4]): (np.load(io.BytesIO(data), allow_pickle=False), int(found[name.replace("npy", "cls")]))
        for name, data in found.items()
        if name.endswith("npy")
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder, job = tmp_path_factory.mktemp("drawn"), drawing()
    assert job.missing(folder) == [0, 1, 2]
    assert [each["samples"] for each in draw_shards(writer(folder, job), [0, 1, 2])] == [4, 4, 3]
    return folder


def test_every_seed_is_there_once_with_the_engines_bits(drawn):
    found = [samples(drawn / f"{shard:05d}.tar") for shard in range(3)]
    assert [list(each) for each in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    with load(SHIPPED_BUNDLE, **OPTIONS) as engine:
        for shard in found:
            labels = [(3, 5, 7)[seed % 3] for seed in shard]
            expected = engine.sample(steps=6, seeds=list(shard), class_labels=labels)
            assert [label for _, label in shard.values()] == labels
            np.testing.assert_array_equal([sample for sample, _ in shard.values()], expected)


def test_processes_write_the_same_bytes(drawn, tmp_path):
    job = drawing()
    done = list(draw_shards(writer(tmp_path, job), job.missing(tmp_path), workers=2))
    assert os.getpid() not in {each["pid"] for each in done}
    for shard in range(3):
        assert job.file(tmp_path, shard).read_bytes() == job.file(drawn, shard).read_bytes()


def test_a_killed_worker_is_an_error_after_which_the_drawing_goes_on(drawn, tmp_path):
    job = drawing()
    done = draw_shards(writer(tmp_path, job), [2, 1, 0, 0, 0, 0, 0, 0], workers=2)
    os.kill(next(done)["pid"], signal.SIGKILL)
    with pytest.raises(EngineStateError, match="into the same folder again"):
        list(done)
    (tmp_path / f".skipstep-{'0' * 16}.partial").write_bytes(b"half")
    list(draw_shards(writer(tmp_path, job), job.missing(tmp_path)))
    assert job.missing(tmp_path) == []
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(each.name for each in drawn.iterdir())
    assert all(job.file(tmp_path, n).read_bytes() == job.file(drawn, n).read_bytes() for n in range(3))


def test_another_drawing_in_the_same_folder_is_refused(drawn):
    for change in ({"num": 12}, {"labels": None}, {"guidance_scale": 2.0}, {"first_seed": 1}):
        with pytest.raises(InputError, match="holds another drawing"):
            drawing(**change).missing(drawn)


def test_what_cannot_be_drawn_is_refused_before_it_is(tmp_path, monkeypatch):
    for change in ({"num": 0}, {"shard_size": 0}, {"first_seed": 2**64 - 3}, {"format": "pickle"}):
        with pytest.raises(InputError):
            drawing(**change)
    with pytest.raises(IntegrityError, match="another network"):
        verified_engine(str(SHIPPED_BUNDLE), "0" * 64, **OPTIONS)
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", 4 * 28 * 28)
    with pytest.raises(InputError, match="smaller shard size"):
        writer(tmp_path, drawing())(0)


def test_the_command_goes_on(drawn, tmp_path, capsys):
    command = [
        "draw",
        "--num",
        "11",
        "--shard-size",
        "4",
        "--steps",
        "6",
        "--classes",
        "3",
        "5",
        "7",
        "--format",
        "tar",
    ]
    command += ["--out", str(tmp_path), "--threads", "1"]
    assert main(command) == 0
    (tmp_path / "00001.tar").unlink()
    assert main(command) == 0
    assert "2 of 3 files are there" in capsys.readouterr().out
    assert (tmp_path / "00001.tar").exists()
    assert main([*command[:-1], "2", "--guidance", "2"]) == 2
    assert "holds another drawing" in capsys.readouterr().err
