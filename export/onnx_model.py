"""A network as an ONNX graph: sample, timestep and conditioning in, out_sample out."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from skipstep.backends.torch import DenoisingModule, zero_conditioning
from skipstep.errors import ExportError, MissingDependencyError
from skipstep.network import NetworkSpec

OPSET = 20
# Raised when this module comes to write another graph for the same network: cached ones are keyed by it.
_FORMAT = 1
_MAX_BYTES = 2**31 - 1


def export_onnx(module: DenoisingModule, spec: NetworkSpec, *, batch_size: int | None = None) -> bytes:
    """Serialise `module` with torch's graph-capturing exporter, opset 20, weights included.

    `batch_size` fixes every shape; None leaves one symbolic dimension named "batch", which a runtime fixes when it
    loads the graph. Inputs: sample float32 `[N, C, H, W]`, timestep int64 `[N]` (float32 if the network takes
    fractional ones), encoder_hidden_states float32 `[N, L, D]` and class_labels int64 `[N]` if it takes them. Output:
    out_sample float32 `[N, C or 2C, H, W]`.
    Raises MissingDependencyError without onnx and onnxscript, and ExportError naming what could not be captured.
    """
    # The exporter specialises a dimension of size 1, so a symbolic one is traced at 2.
    traced = batch_size or 2
    arguments = [
        torch.zeros(traced, *spec.sample_shape),
        torch.zeros(traced, dtype=torch.float32 if spec.fractional_timesteps else torch.int64),
    ]
    conditioning = zero_conditioning(spec, traced)
    arguments += conditioning.values()
    names = ["sample", "timestep", *conditioning]
    shapes = None
    if batch_size is None:
        batch = torch.export.Dim("batch", min=1)
        # What the module takes as *conditioning is one entry of this tuple.
        rest = (tuple({0: batch} for _ in conditioning),) if conditioning else ()
        shapes = ({0: batch}, {0: batch}, *rest)
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                module.eval(),
                tuple(arguments),
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=["out_sample"],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except ImportError as error:
        raise MissingDependencyError(
            got=f"no package {error.name}",
            expected="torch's ONNX exporter with onnx and onnxscript",
            remedy="pip install 'skipstep[export]'",
        ) from error
    except Exception as error:  # The exporter wraps whatever the traced module raised.
        cause = error.__cause__ or error
        raise ExportError(
            got=f"{type(cause).__name__} while capturing {type(module.network).__name__}: {cause}",
            expected="a network whose control flow does not depend on tensor values",
            remedy="use backend='torch', or rewrite the module that the message names",
        ) from error
    assert program is not None
    size = program.model_proto.ByteSize()
    if size > _MAX_BYTES:
        raise ExportError(
            got=f"a graph of {size / 2**30:.1f} GiB",
            expected="at most 2 GiB, the limit of one protobuf message",
            remedy="use backend='torch', or convert the weights to float16",
        )
    return bytes(program.model_proto.SerializeToString())


def exporter_versions() -> str:
    """What an exported graph depends on beside the network: the versions of what makes it."""
    versions = {"format": str(_FORMAT)}
    for package in ("torch", "onnx", "onnxscript", "diffusers"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return ", ".join(f"{name} {value}" for name, value in versions.items())


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter reports optional packages that it does without (torchvision); that is no news to the user."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)
