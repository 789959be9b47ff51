"""Any module of named inputs as an ONNX graph with a symbolic batch: what is computed once before or after a loop."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipstep.backends.onnxruntime import make_session, run_session
from skipstep.errors import ExportError, MissingDependencyError
from skipstep.export.graph_writer import OPSET, serialised
from skipstep.export.large_model import lora_factors_as_inputs, take_weights_out
from skipstep.export.onnx_model import quiet_exporter
from skipstep.networks.graphs import BATCH

# Of the largest value: the summation order of convolutions differs from one runtime to the next.
_TOLERANCE = 1e-4


def export_encoder(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> bytes:
    """Serialise module(*inputs) -> `outputs`, weights included; all have the batch first, here at least 2. Those of a
    gigabyte and more stay beside the graph (skipstep.networks.large_graph).

    Raises MissingDependencyError without onnx and onnxscript, and ExportError for what cannot be captured.
    """
    shapes: tuple[Any, ...] = ({0: torch.export.Dim(BATCH, min=1)},) * len(inputs)
    kinds = {each.kind for each in inspect.signature(module.forward).parameters.values()}
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        shapes = (shapes,)  # What a module takes as *inputs is one entry.
    try:
        with quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=shapes,
                verbose=False,
            )
    except MissingDependencyError:
        raise
    except Exception as error:  # The exporter wraps whatever the traced module raised; its errors are not public.
        cause = error.__cause__ or error
        raise ExportError(
            got=f"{type(cause).__name__} from {type(module).__name__}: {cause!s:.300}",
            expected=f"operators that ONNX opset {OPSET} can express, without control flow on values",
            remedy="rewrite the module that is named",
        ) from error
    assert program is not None, "it returns nothing only where it writes a file"
    lora_factors_as_inputs(program.model, dict(module.named_buffers()))
    weights = take_weights_out(program.model)
    return serialised(program.model_proto, weights)


def check_encoder(graph: bytes, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Compare a graph with what its module gave. Raises ExportError, which calls it `what`."""
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    found = run_session(make_session(graph), list(expected), given)
    for name, tensor in expected.items():
        values = tensor.numpy()
        bound = _TOLERANCE * max(1.0, float(np.abs(values).max()))
        if found[name].shape != values.shape or not np.allclose(found[name], values, rtol=0.0, atol=bound):
            raise ExportError(
                got=f"a graph of the {what} that computes other numbers than the module",
                expected=f"equal within {bound:.1g}",
                remedy=f"report it with the configuration of the {what}",
            )
