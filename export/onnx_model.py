"""A network as an ONNX graph: sample, timestep and conditioning in, out_sample out."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from skipstep.backends.torch import DenoisingModule, zero_conditioning
from skipstep.errors import ExportError, MissingDependencyError
from skipstep.export.bundle_files import package_version
from skipstep.export.graph_writer import OPSET, serialised
from skipstep.networks.spec import NetworkSpec

# Part of the key of cached graphs. Raise it when this module writes another graph for the same network.
_FORMAT = 1


def export_onnx(module: DenoisingModule, spec: NetworkSpec, *, batch_size: int | None = None) -> bytes:
    """Serialise `module` with torch's graph-capturing exporter, opset 20, weights included.

    `batch_size` fixes every shape; None leaves one symbolic dimension named "batch", which a runtime fixes when it
    loads the graph. Inputs: sample float32 `[N, *sample_shape]`, timestep int64 `[N]` (float32 if the network takes
    fractional ones), encoder_hidden_states float32 `[N, L, D]` and class_labels int64 `[N]` if it takes them. Output:
    out_sample float32 `[N, *output_shape]`.
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
            program = _export(module.eval(), tuple(arguments), names, shapes)
    except ImportError as error:
        raise MissingDependencyError(
            got=f"no package {error.name}",
            expected="torch's ONNX exporter with onnx and onnxscript",
            remedy="pip install 'skipstep[export]'",
        ) from error
    return serialised(program.model_proto)


def _export(
    module: DenoisingModule, arguments: tuple[Tensor, ...], names: list[str], shapes: Any
) -> torch.onnx.ONNXProgram:
    """Raises ExportError, naming the submodule that could not be captured or the operator that ONNX lacks."""
    with _first_failure(module.network) as stopped_in:
        try:
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=["out_sample"],
                dynamic_shapes=shapes,
                verbose=False,
            )
        except ImportError:
            raise
        except Exception as error:  # The exporter wraps whatever the traced module raised; its errors are not public.
            cause = error.__cause__ or error
            culprit = _untranslated(module, arguments, str(cause))
            where = culprit or f"{type(cause).__name__} in {stopped_in() or type(module.network).__name__}"
            raise ExportError(
                got=where + ("" if culprit else f": {_first_paragraph(cause)}"),
                expected=f"operators that ONNX opset {OPSET} can express"
                if culprit
                else "a network whose control flow does not depend on tensor values",
                remedy="use backend='torch', or rewrite the module that is named",
            ) from error
    assert program is not None, "it returns nothing only where it writes a file"
    return program


@contextlib.contextmanager
def _first_failure(network: nn.Module) -> Iterator[Callable[[], str | None]]:
    """Gives a function that names the module in which the first failed run of the network stopped."""
    running: list[str] = []
    first: list[str] = []

    def enter(name: str, outermost: bool) -> None:
        if outermost and running:  # The exporter tries again in another way.
            first.extend(running[-1:])
            running.clear()
        running.append(name)

    hooks = []
    for path, each in network.named_modules():
        name = f"{path or 'the network'} ({type(each).__name__})"
        hooks.append(each.register_forward_pre_hook(lambda *_, name=name, path=path: enter(name, not path)))
        hooks.append(each.register_forward_hook(lambda *_: running.pop() and None if running else None))
    try:
        yield lambda: next(iter(first or running[-1:]), None)
    finally:
        for hook in hooks:
            hook.remove()


def _untranslated(module: DenoisingModule, arguments: tuple[Tensor, ...], cause: str) -> str | None:
    """The operator that the exporter could not translate, and the module that calls it; None if it names none."""
    found = re.search(r"translating node %(\w+)", cause)
    if found is None:
        return None
    nodes = torch.export.export(module, arguments, strict=False).run_decompositions().graph.nodes
    for node in nodes:
        if node.name == found[1]:
            path, owner = list(node.meta.get("nn_module_stack", {"": ("", "the network")}).values())[-1]
            owner = str(getattr(owner, "__name__", owner)).rsplit(".", 1)[-1]
            return f"the operator {node.target} in {path.removeprefix('network.') or 'the network'} ({owner})"
    return f"the operator {found[1]}"


def _first_paragraph(error: BaseException) -> str:
    return str(error).strip().split("\n\n")[0].replace("\n", " ")[:500]


def exporter_versions() -> str:
    """The versions that an exported graph depends on beside the network; part of a cache key."""
    versions = {package: package_version(package) for package in ("torch", "onnx", "onnxscript", "diffusers")}
    return ", ".join([f"format {_FORMAT}", *(f"{name} {value}" for name, value in versions.items() if value)])


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs which optional packages it does not find (torchvision); users need not read that."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)
