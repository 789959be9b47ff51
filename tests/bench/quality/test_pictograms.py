"""Pictograms and the model of them in small: what is left out, what is written, and who tells names apart."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from skipstep import Engine
from skipstep.bench.quality import pictograms
from skipstep.bench.quality.pictograms import Pictograms, load_pictograms
from skipstep.errors import MissingDependencyError, ModelFormatError

COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}


def drawn(names: list[str]) -> Pictograms:
    pictures = np.full((len(names), 3, 32, 32), 255, np.uint8)
    for picture, name in zip(pictures, names, strict=True):
        picture[:, 8:24, 8:24] = np.array(COLOURS[name.split()[0]])[:, None, None]
    return Pictograms(pictures, tuple(names), ("Objects",) * len(names))


def svg_to_bytes(*, svg_string: str, width: int, height: int, **_: object) -> bytes:
    """One colour, that of the body."""
    colour = next(colour for name, colour in COLOURS.items() if f"<{name}/>" in svg_string)
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "png")
    return file.getvalue()


def test_names_that_say_what_is_seen_are_kept(tmp_path, monkeypatch):
    kept = {"noto": ["red-apple", "woman", "old-man"], "noto-v1": ["red-apple", "melon"]}
    for name, members in kept.items():
        folder = tmp_path / "@iconify-json" / name
        folder.mkdir(parents=True)
        others = ["ear-light-skin-tone", "mage-tone3", "woman-artist", "family-man-boy", "nine-oclock", "nine-thirty"]
        icons = {each: {"body": "<red/>" if name == "noto" else "<blue/>"} for each in members + others}
        icons |= {"ant": {"body": "<red/>", "hidden": True}, "japanese-here-button": {"body": "<red/>"}}
        (folder / "icons.json").write_text(json.dumps({"icons": icons, "width": 128, "height": 128}))
        categories = {"Food & Drink": ["red-apple", "melon"], "People & Body": ["woman"]}
        (folder / "metadata.json").write_text(json.dumps({"categories": categories}))
    monkeypatch.setattr(pictograms, "optional_package", lambda *_, **__: SimpleNamespace(svg_to_bytes=svg_to_bytes))
    found = pictograms.draw(tmp_path)
    assert found.names == ("old man", "red apple", "woman", "melon", "red apple")
    assert found.pictures[:, :, 5, 5].tolist() == [[255, 0, 0]] * 3 + [[0, 0, 255]] * 2
    assert found.common() == ["red apple"]  # In both sets, and no person.
    with pytest.raises(MissingDependencyError, match="noto"):
        pictograms.draw(tmp_path / "elsewhere")


def test_what_is_no_file_of_pictograms_is_refused(tmp_path):
    with pytest.raises(MissingDependencyError) as caught:
        load_pictograms(tmp_path / "none.npz")
    assert "make pictograms-data" in caught.value.remedy
    (tmp_path / "other.npz").write_bytes(b"PK no archive")
    with pytest.raises(ModelFormatError, match="pickled"):
        load_pictograms(tmp_path / "other.npz")


@pytest.mark.slow
def test_the_folder_draws_what_the_network_that_learnt_predicts(tmp_path):
    pytest.importorskip("transformers")
    from skipstep.bench.quality import train_pictograms

    found = drawn(["red square", "blue square", "green square"])
    np.savez(tmp_path / "data.npz", pictures=found.pictures, names=found.names, categories=found.categories)
    torch.manual_seed(0)
    task = train_pictograms.make_task(tmp_path / "data.npz", widths=(8, 16))
    task.write(task.network, tmp_path / "model")
    task.network.half().float()
    noise = torch.randn(2, 12, 16, 16)
    alpha_bar = task.scheduler.alphas_cumprod[-1]
    label = torch.tensor([0, task.null_label])  # Names are in order: the blue square. And the empty prompt.
    with torch.inference_mode():
        v = task.network(noise, torch.tensor([999, 999]), label)
        x_0 = torch.nn.functional.pixel_shuffle(alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * v, 2)
    with Engine.build(str(tmp_path / "model"), plans=[1], device="cpu", backend="torch") as engine:
        samples = engine.sample(prompt=["Blue  square", ""], steps=1, x_T=noise.numpy())
    assert samples.shape == (2, 3, 32, 32)
    np.testing.assert_allclose(samples, x_0.clip(-1, 1), atol=1e-4)
    assert (samples[0] - samples[1]).any()


def test_the_nearest_name_is_that_of_the_picture(tmp_path):
    from skipstep.bench.quality.evaluate_pictograms import NearestName

    found = drawn([f"{colour} square" for colour in COLOURS] * 2)
    nearest = NearestName(found, tmp_path / "judge.safetensors", steps=40, batch_size=16)
    assert nearest.control() == 1.0
    pictures = torch.from_numpy(found.pictures).float() / 127.5 - 1
    assert nearest(pictures.roll(2, dims=3)).tolist() == list(found.names)
    again = NearestName(found, tmp_path / "judge.safetensors", steps=0)
    assert again(pictures.flip(0)).tolist() == list(found.names)[::-1]
