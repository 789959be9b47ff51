"""The step on a GPU without a compiler: kernels that were compiled ahead of time, launched by the CUDA driver.

    facts + cubin ──choose for this device──▶ load ──▶ begin(x_T), launch(step or its statistics, operands, stage)

Neither torch nor Triton is needed. Cubins are machine code: pass only bytes whose hash has been checked.
skipstep.edge.step_binary describes a cubin; everything that needs a GPU is in skipstep.cuda.driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Self

from skipstep.cuda.driver import CudaDriver, DeviceBuffer
from skipstep.edge.step_binary import ITEM_SIZES, POINTER_ALIGNMENT, Purpose, StepBinaryFacts
from skipstep.errors import DeviceUnavailableError, InputError, ModelFormatError, check_integer
from skipstep.kernels.layout import NUM_COLUMNS, StepFlags

_MAX_BATCH_SIZE: Final = 65_535  # what a grid takes on its second axis
_MAX_INT32: Final = 2**31 - 1
_MAX_UINT64: Final = 2**64 - 1
_C_TYPES: Final[Mapping[str, Any]] = {"int32": ctypes.c_int32, "float32": ctypes.c_float}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOperands:
    """What the step reads and writes; shapes and dtypes are those of skipstep.kernels.step.ddim_step.

    Operands that the flags leave out may be None. The statistics write `rescale` and `bound`; they read `strength`, of
    the rescaling.
    """

    state: DeviceBuffer
    model_output: DeviceBuffer
    network_input: DeviceBuffer
    table: DeviceBuffer
    seeds: DeviceBuffer | None = None
    guidance: DeviceBuffer | None = None
    strength: DeviceBuffer | None = None
    rescale: DeviceBuffer | None = None
    bound: DeviceBuffer | None = None
    history: DeviceBuffer | None = None


class StepLauncher:
    """The kernels of one network's loop on one device, loaded and ready. Safe to share between threads.

    `binaries` are facts and cubins, hashes checked; `num_elements` is C·H·W of a sample; `driver` is a `CudaDriver`
    unless another is given, and the launcher closes it. All kernels that fit are loaded here, so that a launch does
    nothing but launch, and can be captured into a graph.
    Raises InputError, ModelFormatError, DeviceUnavailableError and MissingDependencyError.
    """

    def __init__(
        self,
        binaries: Iterable[tuple[StepBinaryFacts, bytes]],
        *,
        num_elements: int,
        network_dtype: str,
        driver: CudaDriver | None = None,
    ) -> None:
        check_integer("num_elements", num_elements, low=1, high=_MAX_INT32)
        binaries = list(binaries)
        for facts, cubin in binaries:
            _check_cubin(facts, cubin)
        self._num_elements = num_elements
        self._item_size = _item_size(network_dtype)
        self._driver = CudaDriver() if driver is None else driver
        try:
            chosen = _choose(binaries, self._driver, num_elements, network_dtype)
            self._kernels = {
                key: (facts, self._driver.load(cubin, facts.kernel)) for key, (facts, cubin) in chosen.items()
            }
        except BaseException:
            self._driver.close()
            raise

    @property
    def facts(self) -> tuple[StepBinaryFacts, ...]:
        """Those of the kernels that were loaded."""
        return tuple(facts for facts, _ in self._kernels.values())

    def launch(
        self,
        flags: StepFlags,
        operands: StepOperands,
        *,
        batch_size: int,
        stage: int,
        stream: int,
        quantile: tuple[int, float, float] | None = None,
    ) -> None:
        """Enqueue one step on `stream` (a CUstream handle): `operands.state` goes from x_t to x_s in place.

        `quantile`: enqueue the statistics instead that flags for
        thresholding or rescaling need before their step: of the bound its rank below, the weight of the next value and
        the maximum. Nothing is waited for. Raises InputError.
        """
        check_integer("batch_size", batch_size, low=1, high=_MAX_BATCH_SIZE)
        check_integer("stage", stage, low=0, high=_MAX_INT32)
        check_integer("stream", stream, low=0, high=_MAX_UINT64)
        flags = _compiled(flags)
        values: dict[str, float] = {"stage": stage}
        if quantile is None:
            facts, kernel = self._kernel("step", flags)
        else:
            facts, kernel = self._kernel("statistics", flags.of_statistics or flags)
            values |= zip(("low", "weight", "maximum"), quantile, strict=True)
        values |= self._addresses(flags, operands, batch_size, stage, quantile is not None)
        self._enqueue(facts, kernel, values, batch_size, stream)

    def begin(
        self,
        *,
        state: DeviceBuffer,
        network_input: DeviceBuffer,
        seeds: DeviceBuffer,
        given: DeviceBuffer,
        copies: int,
        batch_size: int,
        stream: int,
    ) -> None:
        """Enqueue what comes before the first evaluation: x_T of the seeds, or the `state` that is there where the
        int32 `given` is not zero, in state and, `copies` times, in the network's input. Raises InputError."""
        facts, kernel = self._kernel("noise", StepFlags(guided=copies == 2))
        image = batch_size * self._num_elements
        needed = {
            "state": (state, 4 * image),
            "network_input": (network_input, copies * self._item_size * image),
            "seeds": (seeds, 8 * batch_size),
            "given": (given, 4),
        }
        addresses = {f"{name}_ptr": _checked_address(name, *each) for name, each in needed.items()}
        self._enqueue(facts, kernel, addresses, batch_size, stream)

    def _enqueue(
        self, facts: StepBinaryFacts, kernel: Any, values: Mapping[str, float], batch_size: int, stream: int
    ) -> None:
        values = {**values, "num_elements": self._num_elements}
        # The driver reads every argument through a pointer to it, as many bytes as the kernel declares.
        arguments = [
            _C_TYPES.get(argument.type, ctypes.c_uint64)(values.get(argument.name, 0)) for argument in facts.arguments
        ]
        parameters = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self._driver.launch(
            kernel,
            grid=facts.grid(self._num_elements, batch_size),
            threads=facts.threads_per_block,
            shared_bytes=facts.dynamic_shared_bytes,
            stream=stream,
            parameters=ctypes.addressof(parameters),
        )

    def missing(self, flags: Iterable[StepFlags]) -> str:
        """The kernels that are not there of those that steps with these flags need, in words; empty where all are."""
        wanted: dict[_Key, None] = {}
        for each in map(_compiled, flags):
            wanted["step", each] = None
            if (of_statistics := each.of_statistics) is not None:
                wanted["statistics", of_statistics] = None
        return ", ".join(_describe(*key) for key in wanted if key not in self._kernels)

    def __str__(self) -> str:
        return "; ".join(_describe(*key) for key in self._kernels)

    def close(self) -> None:
        """Unload the kernels. The launcher cannot be used afterwards."""
        self._kernels = {}
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _kernel(self, purpose: Purpose, flags: StepFlags) -> tuple[StepBinaryFacts, Any]:
        try:
            return self._kernels[purpose, flags]
        except KeyError:
            raise InputError(
                got=_describe(purpose, flags),
                expected=f"one of {self}",
                remedy="export the kernels of the plans that run here (skipstep.export.cubins.needed_variants)",
            ) from None

    def _addresses(
        self, flags: StepFlags, operands: StepOperands, batch_size: int, stage: int, statistics: bool
    ) -> dict[str, int]:
        """Address by argument, each checked to be aligned and to hold what the kernel will touch."""
        image = batch_size * self._num_elements
        network = image * self._item_size
        halves = 2 if flags.guided else 1
        needed = {
            "state": 4 * image,
            "model_output": network * halves * (2 if flags.wide_output else 1),
            "network_input": network * flags.input_copies,
            "table": 4 * NUM_COLUMNS * (stage + 1),
            "seeds": 8 * batch_size * flags.add_noise,
            "guidance": 4 * batch_size * flags.guided,
            "strength": 4 * batch_size * flags.rescale * statistics,
            "rescale": 4 * batch_size * flags.rescale,
            "bound": 4 * batch_size * flags.threshold,
            "history": 4 * image * flags.num_slots,
        }
        checked = {
            name: _checked_address(name, getattr(operands, name), num_bytes)
            for name, num_bytes in needed.items()
            if num_bytes
        }
        # An operand that the flags leave out is never touched; any pointer will do.
        addresses = dict.fromkeys((*needed, "x0", "counter", "broken"), checked["state"]) | checked
        output = addresses.pop("model_output")
        return {f"{name}_ptr": address for name, address in addresses.items()} | {
            "next_ptr": addresses["state"],
            "output_ptr": output,
        }


def _compiled(flags: StepFlags) -> StepFlags:
    """As kernels are compiled: in a call without guidance nothing is said of it."""
    return flags if flags.guided else replace(flags, unguided=False, scale_guidance=False)


_Key = tuple[Purpose, StepFlags]


def _choose(
    binaries: list[tuple[StepBinaryFacts, bytes]], driver: CudaDriver, num_elements: int, network_dtype: str
) -> dict[_Key, tuple[StepBinaryFacts, bytes]]:
    """The best binary for this device of every variant: wide accesses before any, then the nearest architecture."""
    capability, cuda_major = driver.capability(), driver.cuda_major()
    fitting = [pair for pair in binaries if pair[0].runs_on(capability)]
    if not fitting:
        raise DeviceUnavailableError(
            got=f"a device of compute capability {capability // 10}.{capability % 10}",
            expected="one that runs " + (", ".join(sorted({f.target for f, _ in binaries})) or "no kernels at all"),
            remedy=f"export the bundle again: skipstep export --target sm_{capability}",
        )
    loadable = [pair for pair in fitting if int(pair[0].toolkit.split(".")[0]) <= cuda_major]
    if not loadable:
        raise DeviceUnavailableError(
            got=f"a driver for CUDA {cuda_major}",
            expected="CUDA " + " or ".join(sorted({facts.toolkit for facts, _ in fitting})) + ", as the kernels need",
            remedy="update the driver, or export with a Triton whose assembler is older",
        )
    usable = [
        pair
        for pair in loadable
        if pair[0].network_dtype == network_dtype and num_elements % pair[0].num_elements_multiple == 0
    ]
    if not usable:
        there = sorted({(facts.network_dtype, facts.num_elements_multiple) for facts, _ in loadable})
        raise InputError(
            got=f"a {network_dtype} network with {num_elements} elements per sample",
            expected="one of " + "; ".join(f"{dtype}, elements a multiple of {n}" for dtype, n in there),
            remedy="export the kernels for this network",
        )
    usable.sort(key=lambda pair: (pair[0].num_elements_multiple, pair[0].architecture))
    return {(facts.purpose, facts.flags): (facts, cubin) for facts, cubin in usable}


def _check_cubin(facts: StepBinaryFacts, cubin: bytes) -> None:
    """An ELF file for CUDA (machine 190): the driver would take other things too, such as source to compile."""
    if cubin[:4] != b"\x7fELF" or int.from_bytes(cubin[18:20], "little") != 190:
        raise ModelFormatError(
            got=f"{len(cubin)} bytes that begin {cubin[:4]!r} for {facts.target}",
            expected="a cubin",
            remedy="export the kernels again",
        )


def _checked_address(name: str, buffer: DeviceBuffer | None, num_bytes: int) -> int:
    if buffer is not None and (
        buffer.address > 0 and buffer.address % POINTER_ALIGNMENT == 0 and buffer.num_bytes >= num_bytes
    ):
        return buffer.address
    raise InputError(
        got=f"no {name}" if buffer is None else f"{name}: {buffer.num_bytes} bytes at {buffer.address:#x}",
        expected=f"at least {num_bytes} bytes at a multiple of {POINTER_ALIGNMENT}",
        remedy=f"pass {name} as the flags, the batch size and the stage need it",
    )


def _item_size(network_dtype: str) -> int:
    try:
        return ITEM_SIZES[network_dtype]
    except KeyError:
        raise InputError(
            got=f"network_dtype={network_dtype!r}",
            expected=", ".join(ITEM_SIZES),
            remedy="pass the dtype of the network's input and output",
        ) from None


def _describe(purpose: Purpose, flags: StepFlags) -> str:
    on = {"step": [], "noise": ["initial noise"], "statistics": ["statistics"]}[purpose]
    on += [name for name, value in asdict(flags).items() if value]
    return "+".join(on) or "plain"
