"""Values that belong nowhere, or only in some places, made anew for every call: what a caller may pass by mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class RaisingDLPack:
    """What offers DLPack, and then does not have it."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __dlpack_device__(self) -> tuple[int, int]:
        if self.where == "device":
            raise KeyError("no device")
        return 1, 0

    def __dlpack__(self, **_: object) -> object:
        raise AssertionError("no memory")


class RaisingArray:
    """What offers NumPy an array, and then does not have it."""

    def __array__(self, *_: object, **__: object) -> Any:
        raise KeyError("no array")


def _read_only(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    array = np.zeros(shape, np.float32)
    array.setflags(write=False)
    return array


def _overflowing(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.full(shape, 1e300)


def _numbers() -> dict[str, Callable[[], Any]]:
    values = {
        "None": None,
        "True": True,
        "np.True_": np.True_,
        "-1": -1,
        "0": 0,
        "-0.0": -0.0,
        "1": 1,
        "2.5": 2.5,
        "2**31": 2**31,
        "2**64": 2**64,
        "10**400": 10**400,
        "1e300": 1e300,
        "nan": float("nan"),
        "inf": float("inf"),
        "-inf": float("-inf"),
        "1j": 1j,
        "np.int64": np.int64(1),
        "np.uint64": np.uint64(2**64 - 1),
        "np.float64 nan": np.float64("nan"),
        "np.float16": np.float16(0.5),
        "np.datetime64": np.datetime64("2020-01-01"),
    }
    return {name: lambda value=value: value for name, value in values.items()}  # type: ignore[misc]


def _objects() -> dict[str, Callable[[], Any]]:
    return {
        "empty text": lambda: "",
        "text": lambda: "no such thing",
        "NUL in text": lambda: "a\0b",
        "a lone surrogate": lambda: "\ud800",
        "bytes": lambda: b"\x01",
        "bytearray": lambda: bytearray(4),
        "an object": object,
        "a class": lambda: int,
        "an empty list": list,
        "a list of None": lambda: [None],
        "a list of text": lambda: ["1", "2"],
        "a ragged list": lambda: [1, [2, 3]],
        "a list of bool": lambda: [True, False],
        "a nested list": lambda: [[[[0.0]]]],
        "10**400 in a list": lambda: [10**400],
        "an empty dict": dict,
        "a dict": lambda: {"a": 1},
        "a set": lambda: {1},
        "a range": lambda: range(2),
        "an exhausted iterator": lambda: iter(()),
        "raising DLPack": lambda: RaisingDLPack("memory"),
        "raising DLPack device": lambda: RaisingDLPack("device"),
        "raising array": RaisingArray,
    }


def _arrays(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    return {
        "0-d array": lambda: np.array(1.0),
        "0-d integer array": lambda: np.array(1),
        "empty array": lambda: np.empty(0, np.float32),
        "int array": lambda: np.arange(2),
        "bool array": lambda: np.array([True, False]),
        "object array": lambda: np.array([None, 1], dtype=object),
        "text array": lambda: np.array(["a", "b"]),
        "structured array": lambda: np.zeros(2, [("a", "f4"), ("b", "i4")]),
        "complex array": lambda: np.zeros(shape, np.complex64),
        "wrong shape": lambda: np.zeros((3, 2), np.float32),
        "fitting": lambda: np.full(shape, 0.5, np.float32),
        "fitting float64": lambda: np.full(shape, 0.5),
        "fitting float16": lambda: np.full(shape, 0.5, np.float16),
        "fitting longdouble": lambda: np.full(shape, 0.5, np.longdouble),
        "fitting big-endian": lambda: np.full(shape, 0.5, ">f4"),
        "fitting non-contiguous": lambda: np.full((*shape[:-1], 2 * shape[-1]), 0.5, np.float32)[..., ::2],
        "fitting reversed": lambda: np.full(shape, 0.5, np.float32)[::-1, ..., ::-1],
        "fitting read-only": lambda: _read_only(shape),
        "fitting broadcast": lambda: np.broadcast_to(np.float32(0.5), shape),
        "fitting masked": lambda: np.ma.masked_array(np.full(shape, 0.5, np.float32), mask=True),
        "fitting nan": lambda: np.full(shape, np.nan, np.float32),
        "fitting inf": lambda: np.full(shape, np.inf, np.float32),
        "fitting int64": lambda: np.zeros(shape, np.int64),
        "beyond float32": lambda: _overflowing(shape),
    }


def _tensors(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    def half(**options: Any) -> torch.Tensor:
        return torch.full(shape, 0.5, **options)

    return {
        "0-d tensor": lambda: torch.tensor(1),
        "0-d bool tensor": lambda: torch.tensor(True),
        "empty tensor": lambda: torch.empty(0),
        "int tensor": lambda: torch.arange(2),
        "uint64 tensor": lambda: torch.arange(2).to(torch.uint64),
        "tensor": half,
        "requires-grad tensor": lambda: half(requires_grad=True),
        "float64 tensor": lambda: half(dtype=torch.float64),
        "bfloat16 tensor": lambda: half(dtype=torch.bfloat16),
        "fp8 tensor": lambda: half().to(torch.float8_e4m3fn),
        "complex tensor": lambda: half(dtype=torch.complex64),
        "neg-view tensor": lambda: torch.complex(half(), half()).conj().imag,
        "conjugate tensor": lambda: torch.complex(half(), half()).conj(),
        "channels-last tensor": lambda: (
            half().expand(2, *shape[1:]).contiguous(memory_format=torch.channels_last) if len(shape) == 4 else half()
        ),
        "expanded tensor": lambda: torch.tensor(0.5).expand(shape),
        "sparse tensor": lambda: half().to_sparse(),
        "csr tensor": lambda: torch.ones(2, 2).to_sparse_csr(),
        "nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "jagged tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "quantized tensor": lambda: torch.quantize_per_tensor(half(), 0.1, 0, torch.qint8),
        "meta tensor": lambda: half(device="meta"),
        "parameter": lambda: torch.nn.Parameter(half()),
        "a module": lambda: torch.nn.Identity(),
    }


def hostile_values(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """What makes each value, by its name; "fitting" arrays and the tensors have `shape`."""
    return {**_numbers(), **_objects(), **_arrays(shape), **_tensors(shape)}
