"""What torch's libraries may do while a network runs, and what the process finds afterwards."""

import pytest
import torch
from tiny_networks import Curve

from skipstep.backends.denoiser import Target
from skipstep.backends.torch import prepare_module
from skipstep.backends.torch_cuda import TorchDeviceDenoiser, library_settings
from skipstep.networks.spec import NetworkSpec


def settings() -> tuple[object, ...]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, matmul.fp32_precision, cudnn.benchmark


@pytest.fixture(params=["defaults", "legacy", "by operator"])
def process(request: pytest.FixtureRequest) -> object:
    """However the process has set torch."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with library_settings(tf32=False):  # It takes all of it back.
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = True, False, False
        if request.param == "legacy":
            cudnn.allow_tf32, matmul.allow_tf32 = False, True
        elif request.param == "by operator":
            cudnn.conv.fp32_precision, matmul.fp32_precision, cudnn.benchmark = "tf32", "ieee", True
        yield request.param


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize("tf32", [False, True])
def test_float32_is_float32_unless_tf32_is_asked_for(tf32: bool) -> None:
    before, seen = settings(), []

    class Looks(Curve):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append((*settings(), torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return super().forward(x, t)

    module, spec = prepare_module(Looks(), NetworkSpec((1, 3, 5)))
    cpu = torch.device("cpu")
    network = TorchDeviceDenoiser(module, spec, batch_size=2, device=cpu, dtype=torch.float32, tf32=tf32)
    seen.clear()
    network.new_context()({"timestep": torch.zeros(1, 2)}, 0)
    precision = "tf32" if tf32 else "ieee"
    assert seen == [(precision, precision, precision, True, tf32, tf32)]
    assert settings() == before


def test_tf32_is_a_precision_of_float32_tensors() -> None:
    assert Target("cuda:0", "tf32").dtype == "float32"
    assert Target("cuda:0", "float16").dtype == "float16"
