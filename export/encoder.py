"""Any module of named inputs as an ONNX graph with a symbolic batch: what is computed once before a loop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from skipstep.errors import ExportError, MissingDependencyError
from skipstep.export.graph_writer import OPSET, serialised
from skipstep.export.onnx_model import quiet_exporter
from skipstep.networks.graphs import BATCH


def export_encoder(module: nn.Module, inputs: Mapping[str, Tensor], output: str) -> bytes:
    """Serialise module(*inputs) -> `output`, weights included; all have the batch first, here at least 2.

    Raises MissingDependencyError without onnx and onnxscript, and ExportError for what cannot be captured.
    """
    batch = torch.export.Dim(BATCH, min=1)
    try:
        with quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                tuple(inputs.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=[output],
                # What the module takes as *inputs is one entry.
                dynamic_shapes=(tuple({0: batch} for _ in inputs),),
                verbose=False,
            )
    except ImportError as error:
        raise MissingDependencyError(
            got=f"no package {error.name}",
            expected="torch's ONNX exporter with onnx and onnxscript",
            remedy="pip install 'skipstep[export]'",
        ) from error
    except Exception as error:  # The exporter wraps whatever the traced module raised; its errors are not public.
        cause = error.__cause__ or error
        raise ExportError(
            got=f"{type(cause).__name__} from {type(module).__name__}: {cause!s:.300}",
            expected=f"operators that ONNX opset {OPSET} can express, without control flow on values",
            remedy="rewrite the module that is named",
        ) from error
    assert program is not None, "it returns nothing only where it writes a file"
    return serialised(program.model_proto)
