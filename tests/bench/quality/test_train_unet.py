"""The training script on a small data set: what it writes, and that stopping and going on changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from demo_data import write_fashion_mnist
from safetensors.numpy import load_file

from skipstep import NoiseSchedule
from skipstep.bench.quality.train_unet import NULL_LABEL, RECIPES, learning_rate, training_batch
from skipstep.networks.checkpoint import read_checkpoint

SCHEDULE = torch.tensor(NoiseSchedule.linear(1000).alpha_bar, dtype=torch.float32)


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    write_fashion_mnist(tmp_path / "data", train=64, test=10)

    def train(out: str, *options: str) -> dict[str, np.ndarray]:
        command = [sys.executable, "-m", "skipstep.bench.quality.train_unet", "--out", tmp_path / out]
        command += ["--device", "cpu", "--data", tmp_path / "data", *options]
        command += ["--epochs", "1", "--batch-size", "16", "--save-every", "1"]
        subprocess.run(command, check=True, capture_output=True, timeout=240)
        return load_file(tmp_path / out / "checkpoint.safetensors")

    whole = train("whole")
    train("stopped", "--stop-after", "2")
    assert not (tmp_path / "stopped" / "model").exists()
    resumed = train("stopped")
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        np.testing.assert_allclose(tensor, resumed[name], rtol=0, atol=1e-6, err_msg=name)

    checkpoint = read_checkpoint(tmp_path / "whole" / "model")
    assert (checkpoint.num_classes, checkpoint.null_label, checkpoint.sample_shape) == (10, 10, (1, 28, 28))
    assert checkpoint.scheduler is not None
    assert checkpoint.scheduler.prediction_type == "v_prediction"
    assert {tensor.dtype for tensor in load_file(checkpoint.weights[0]).values()} == {np.dtype(np.float16)}
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def batch(step: int, *, label_dropout: float = 0.5, num_images: int = 64):
    images = torch.arange(num_images, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 1, 2, 2) / num_images
    labels = torch.arange(num_images) % 10
    return training_batch(images, labels, SCHEDULE, step=step, batch_size=16, seed=0, label_dropout=label_dropout)


def test_a_batch_is_what_the_loss_says():
    """v and x_t give back the images: x0 = sqrt(a)·x_t - sqrt(1-a)·v, and an epoch shows each image once."""
    seen = []
    for step in range(4):
        x_t, t, label, v = batch(step, label_dropout=0.0)
        a = SCHEDULE[t].view(-1, 1, 1, 1)
        x0 = a.sqrt() * x_t - (1 - a).sqrt() * v
        index = (x0.mean(dim=(1, 2, 3)) * 64).round().long()
        assert torch.equal(label, index % 10)
        seen += index.tolist()
    assert sorted(seen) == list(range(64))


def test_a_recipe_of_epsilon_learns_the_noise():
    images, labels = torch.zeros(64, 1, 2, 2), torch.zeros(64, dtype=torch.int64)
    options = {"step": 0, "batch_size": 16, "seed": 0, "label_dropout": 0.0}
    x_t, t, _, eps = training_batch(images, labels, SCHEDULE, **options, prediction_type="epsilon")
    torch.testing.assert_close(x_t, (1 - SCHEDULE[t].view(-1, 1, 1, 1)).sqrt() * eps)
    scheduler = RECIPES["unconditional"].scheduler()
    assert (scheduler.config.prediction_type, scheduler.config.clip_sample) == ("epsilon", True)
    assert RECIPES["unconditional"].unet().config.num_class_embeds is None


def test_labels_are_dropped_at_their_rate():
    dropped = torch.stack([batch(step)[2] == NULL_LABEL for step in range(200)]).float().mean().item()
    assert dropped == pytest.approx(0.5, abs=0.04)


def test_timesteps_cover_the_schedule_evenly():
    timesteps = torch.cat([batch(step)[1] for step in range(200)])
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    counts = torch.histc(timesteps.float(), bins=10, min=0, max=1000)
    assert (counts / counts.sum()).numpy() == pytest.approx(np.full(10, 0.1), abs=0.005)


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(step, num_steps=1000, peak=1.0) for step in range(1000)]
    assert np.argmax(rates) == 199
    assert rates[199] == pytest.approx(1.0)
    assert rates[-1] < 0.011
    assert all(np.diff(rates[200:]) < 0)
