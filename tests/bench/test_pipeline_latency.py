"""What the parts of a text-to-picture call take, by contenders that draw the same picture."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_pipelines import tiny_pipeline

from skipstep.bench import pipeline_latency
from skipstep.bench.pipeline_forms import FORMS, STEPS
from skipstep.bench.pipeline_latency import CONTENDERS, HEADER, main, measure
from skipstep.bench.record import environment, write_finding


@pytest.mark.slow
def test_every_part_of_calls_that_draw_the_same_picture(tmp_path):
    genai = importlib.util.find_spec("openvino_genai") is not None
    for form in ("diffusers", "bundle", *["openvino"] * genai):
        FORMS[form](tmp_path / form, 16, tiny_pipeline("sd")[1])
    for name in [name for name in CONTENDERS if genai or "genai" not in name]:
        found = measure(name, tmp_path, 16, 7.5)
        assert [call["steps"] for call in found["calls"]] == list(STEPS)
        assert all(min(call["parts"]) > 0 for call in found["calls"]) or "genai" in name
        assert all(sum(call["parts"]) == pytest.approx(call["seconds"]) for call in found["calls"])
    reference = tmp_path / f"picture-7.5-{STEPS[0]}.npy"
    np.save(reference, np.load(reference) + 5)
    with pytest.raises(SystemExit, match="another picture than diffusers': off by 5"):
        measure("skipstep", tmp_path, 16, 7.5)


def test_an_interrupted_run_goes_on_and_shows_medians_of_rounds(tmp_path, monkeypatch):
    measured = []
    for name, turn, seconds in (("diffusers", 0, 4.0), ("skipstep", 0, 2.0), ("skipstep", 1, 6.0)):
        call = {"steps": 2, "seconds": seconds, "off": turn / 10}
        call["parts"] = [seconds * share for share in (0.1, 0.5, 0.3, 0.1)]
        measured.append({"contender": name, "guidance": 1.0, "round": turn, "peak": 2e9, "calls": [call]})
    out, real, asked = tmp_path / "out.json", subprocess.run, []
    given = ["--out", str(out), "--work", str(tmp_path), "--rounds", "2", "--guidance", "1"]
    given += ["--contenders", "diffusers", "skipstep"]
    case = ["None", 256, torch.get_num_threads(), environment()["commit"]]
    write_finding(out, command="", header=HEADER, rows=[], note="", case=case, measured=measured)

    def run(words, **named):
        if "--side" not in words:
            return real(words, **named)
        asked.append(words[words.index("--side") + 2 :])
        return subprocess.CompletedProcess(words, 1, "", "Traceback\nMemoryError: too much")

    monkeypatch.setattr(pipeline_latency.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["pipeline_latency", *given])
    main()
    assert asked[:2] == [["--make", "diffusers"], ["--make", "bundle"]]
    assert asked[2:] == [["--measure", "diffusers", "--guidance", "1.0"]]
    found = json.loads(out.read_text())
    shares = ["10.0%", "50.0%", "30.0%", "10.0%", "2.0"]
    assert found["rows"][1] == ["skipstep", "1", "2", "4", "2", "1", *shares, "0.1"]
    assert "Without a number: diffusers: MemoryError: too much." in found["note"]
