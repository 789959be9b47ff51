"""The judge of pictures: a network whose features are compared, and which may say what class it sees."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import InputError

_PART = 500

Floats = NDArray[np.float32]


class Judge(Protocol):
    """`digest` identifies its weights: results of two judges are not compared."""

    digest: str

    def __call__(self, images: Floats) -> tuple[Floats, NDArray[np.int64] | None]:
        """Features `[N, F]` of images `[N, C, H, W]`, and the classes seen `[N]` where it knows classes."""
        ...


class OnnxJudge:
    """A feature network in an ONNX file of its own, without external data. Raises InputError for another.

    It has one input float32 `[N, C, H, W]` in [-1, 1], an output `[N, F]` of features, and, where it names classes,
    another of logits `[N, K]`.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime as ort

        try:
            contents = path.read_bytes()
            self._session: Any = ort.InferenceSession(contents, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common class below Exception.
            raise _no_judge(f"{path} ({str(error).splitlines()[0]})") from error
        self.digest = hashlib.sha256(contents).hexdigest()
        self._inputs = [each.name for each in self._session.get_inputs()]
        if len(self._inputs) != 1:
            raise _no_judge(f"{path} with the inputs {', '.join(self._inputs)}")

    def __call__(self, images: Floats) -> tuple[Floats, NDArray[np.int64] | None]:
        parts = []
        for first in range(0, len(images), _PART):
            part = images[first : first + _PART].clip(-1, 1)
            try:
                outputs = self._session.run(None, {self._inputs[0]: part})
            except Exception as error:
                raise _no_judge(f"for images {list(part.shape)}: {str(error).splitlines()[0]}") from error
            if any(output.ndim != 2 or len(output) != len(part) for output in outputs[:2]):
                raise _no_judge(f"outputs {', '.join(str(list(output.shape)) for output in outputs)}")
            parts.append(outputs[:2])
        features, *logits = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return features.astype(np.float32), logits[0].argmax(axis=1) if logits else None


def _no_judge(got: str) -> InputError:
    return InputError(
        got=f"a feature network {got}",
        expected="ONNX without external data, float32 [N, C, H, W] to features [N, F] and perhaps logits [N, K]",
        remedy="export one with torch.onnx.export and a dynamic batch, and pass --features FILE.onnx",
    )
