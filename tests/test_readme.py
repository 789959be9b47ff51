"""The README's Python runs as it stands, on the shipped model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from skipstep.demo import SHIPPED_MODEL

README = Path(__file__).parents[1] / "README.md"


def test_its_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    rng = np.random.default_rng(0)
    pictures = rng.uniform(-1, 1, (5, 1, 28, 28)).astype(np.float32)
    names = {
        "noise": rng.standard_normal((2, 1, 28, 28)),
        "photos": pictures,
        "sneakers": pictures,
        "buffer": np.full((4, 1, 28, 28), np.nan, np.float32),
    }
    quick = {
        "my-ddpm": str(SHIPPED_MODEL),
        "calibrate()": "calibrate(repeats=3, plans=[10], batch_sizes=[1])",
        "deadline_ms=40": "deadline_ms=1e6",
    }
    for block in blocks:
        if 'device="cuda"' in block and not torch.cuda.is_available():
            compile(block, "README.md", "exec")
            continue
        for text, instead in quick.items():
            block = block.replace(text, instead)
        exec(block, names)
        if "images" in names and "pictures" not in names:
            names["pictures"] = names["images"]
    assert [image.size for image in names["pictures"]] == [(28, 28)] * 4
    assert np.isfinite(names["buffer"]).all()
    assert names["future"].done()
    assert names["x_0"].shape == (2, 1, 28, 28)
    assert names["again"].shape == names["boots"].shape == pictures.shape
    assert len(names["between"]) == 10
    assert names["path"].x_t.shape == (10, 1, 1, 28, 28)
    assert "plan" in capsys.readouterr().out


def test_every_file_that_it_links_to_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
