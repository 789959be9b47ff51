"""The README's Python runs as it stands, on the shipped model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from skipstep.demo import SHIPPED_MODEL

README = Path(__file__).parents[1] / "README.md"


def test_its_examples_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 2
    rng = np.random.default_rng(0)
    pictures = rng.uniform(-1, 1, (5, 1, 28, 28)).astype(np.float32)
    names = {"noise": rng.standard_normal((2, 1, 28, 28)), "photos": pictures, "sneakers": pictures}
    for block in blocks:
        exec(block.replace("my-ddpm", str(SHIPPED_MODEL)), names)
    assert [image.size for image in names["images"]] == [(28, 28)] * 4
    assert names["x_0"].shape == (2, 1, 28, 28)
    assert names["again"].shape == names["boots"].shape == pictures.shape
    assert len(names["between"]) == 10
    assert names["path"].x_t.shape == (10, 1, 1, 28, 28)
    assert "plan" in capsys.readouterr().out


def test_every_file_that_it_links_to_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
