"""The denoiser protocol: a network behind fixed buffers, on any device, as every loop drives it.

    values  = denoiser.compute(timesteps, conditioning)      once per call: the step inputs of all stages
    enqueue = denoiser.new_context()                         once per captured graph, or per set of buffers
    enqueue(values, stage)                                   E times: reads `input`, writes `output`

A network keeps no state between calls: its step inputs are passed to it, and what it reads never moves. On a GPU the
loop owns the memory of the step inputs, so that one captured graph serves every plan of equal structure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from skipstep.backends.processor import Splits
from skipstep.calls.conditioning import Conditioning
from skipstep.errors import check_integer
from skipstep.networks.graphs import NetworkGraphs, StepInputs, Values
from skipstep.networks.spec import NetworkSpec

# enqueue(values, stage). In host memory values are StepInputs and the stage is a number. On a GPU values are tensors by
# name, and the stage is a number or an int32 [1] tensor, for a graph of one step that the device counts.
Enqueue = Callable[[Any, Any], None]

MAX_THREADS = 1024


class KeptBytes(Protocol):
    """Bytes that outlive the process, verified when they are read (skipstep.bundles.kept)."""

    def get(self) -> bytes | None: ...
    def put(self, data: bytes) -> None: ...


# keep(description, parts): bytes that depend on these parts.
Keep = Callable[[str, Mapping[str, Any]], KeptBytes]
# Of a network; skipstep.backends.registry has which backend runs in which.
Precision = Literal["float32", "tf32", "float16", "bfloat16", "int8", "fp8"]
# Layers in 8 bits, in a network of half precision on a GPU, and of float32 on the CPU.
EIGHT_BITS = ("int8", "fp8")
# Of TensorRT engines.
Library = Literal["tensorrt", "tensorrt_rtx"]


class RunPart(Protocol):
    """A graph beside the network, from arrays in host memory to others (skipstep.pipelines.pipeline)."""

    def __call__(self, outputs: Sequence[str], given: Mapping[str, NDArray[Any]]) -> Values:
        """Outputs by name, from those of the `given` values that the graph reads. Raises ExportError."""
        ...


class Denoiser(Protocol):
    """A network at one batch size N.

    `input` `[N, *sample_shape]` and `output` `[N, *output_shape]` (NetworkSpec) are NumPy arrays float32, or CUDA
    tensors in the network's dtype, both in plain or both in channels-last order. On a GPU `output` may be another
    tensor after each evaluation: it is to be read then. In a recording it stands in the graph's memory.
    """

    name: str
    batch_size: int
    input: Any
    output: Any

    def compute(self, timesteps: NDArray[np.float64], conditioning: Conditioning) -> StepInputs:
        """The step inputs for `timesteps` `[E, N]` and the conditioning of N samples, in host memory."""
        ...

    def new_context(self) -> Enqueue:
        """How to evaluate the network on its buffers. On a GPU, `enqueue` launches work on the current stream and does
        nothing else; each captured graph takes its own context and keeps it, because what a library remembers
        between launches must not be shared between graphs. Contexts share buffers: only one may be running."""
        ...


@dataclass(frozen=True, slots=True)
class StepInput:
    """A step input, computed before the loop: `shape` of one sample's, `dtype` by name ("bfloat16"), and whether every
    stage has its own."""

    shape: tuple[int, ...]
    dtype: str
    per_stage: bool


class DeviceDenoiser(Denoiser, Protocol):
    """A denoiser on a GPU, with what a loop must know to give it memory and to capture it.

    `step_inputs` by name: the loop allocates them. `capture_refusal`: why the network cannot be recorded into a CUDA
    graph of ours, None where it can. `fallback`: why a stage computes more of the network than it has to, None where it
    does not.
    """

    step_inputs: Mapping[str, StepInput]
    capture_refusal: str | None
    fallback: str | None


MakeDenoiser = Callable[[int], Denoiser]


class NetworkSource(Protocol):
    """Where a backend gets a network from: a model (skipstep.building) or a bundle (skipstep.bundle_source).

    Each method raises InputError, with a remedy, where this source has no such thing.
    """

    @property
    def name(self) -> str: ...
    @property
    def spec(self) -> NetworkSpec: ...
    @property
    def tables(self) -> dict[bytes, Values]:
        """Values that follow from timesteps alone, if they are known (skipstep.backends.onnxruntime.EarlyGraphs)."""
        ...

    def module(self) -> Any:
        """The torch module that predicts (skipstep.backends.torch.DenoisingModule), in float32 on the CPU."""
        ...

    def before_loop(self) -> Mapping[str, bytes]:
        """The serialised parts that run before the loop (NetworkGraphs.before_loop)."""
        ...

    def step_graph(self, precision: str) -> bytes:
        """The serialised step network in "float32", "float16", "bfloat16", or in a form of skipstep.quantizing."""
        ...

    @property
    def engine_libraries(self) -> tuple[str, ...]:
        """The libraries that `tensorrt_engine` has engines for."""
        ...

    def tensorrt_engine(
        self,
        library: str,
        *,
        version: str,
        device: int,
        batch_sizes: Sequence[int],
        precision: str,
        again: bool = False,
    ) -> bytes:
        """A verified TensorRT engine of the step network for that GPU of this machine: at the first of `batch_sizes`,
        and at the others where one engine can be. `again`: the library did not take the one that was given before."""
        ...

    def engine_graph(self, precision: str) -> bytes:
        """The graph that such engines are built from: one without weights is given those of it."""
        ...


def tensor_dtype(precision: str) -> str:
    """Of a network's inputs and outputs on a GPU, by its precision."""
    return "float32" if precision == "tf32" else "float16" if precision in EIGHT_BITS else precision


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how a network is to run.

    device       "cpu", or torch's name of a GPU, such as "cuda:0".
    precision    of the network; the state is float32 everywhere.
    num_threads  of the runtime on the CPU; None: every core.
    compiled     run torch's module through torch.compile first.
    stream       on a GPU: the torch stream of the engine, None for a stand-in device.
    library      "tensorrt" or "tensorrt_rtx"; None: what is installed and has engines.
    keep         where a library keeps what it compiled, None: nowhere.
    batch_sizes  of the network, for libraries that compile for all of them at once.
    splits       how batches are divided; a backend on the CPU that can says on how many threads.
    lora         the memory of a network's LoRA inputs by name (skipstep.networks.lora_layers), which swaps write.
    check        called before a network is compiled, of which a reference may be in memory until it returns. What it
                 returns compares a denoiser of it with the reference before it is kept, and raises ExportError. For
                 backends that compile when a batch size is first needed.
    """

    device: str = "cpu"
    precision: Precision = "float32"
    num_threads: int | None = None
    compiled: bool = False
    stream: Any = None
    library: Library | None = None
    keep: Keep | None = None
    batch_sizes: tuple[int, ...] = ()
    check: Callable[[], Callable[[Denoiser], object]] | None = None
    splits: Splits = field(default_factory=Splits)
    lora: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Of the network's tensors on a GPU: "tf32" is float32 whose products it may round to ten bits."""
        return tensor_dtype(self.precision)

    def __post_init__(self) -> None:
        if self.num_threads is not None:
            check_integer(
                "num_threads", self.num_threads, low=1, high=MAX_THREADS, remedy="leave it out for every core"
            )


__all__ = [
    "EIGHT_BITS",
    "Denoiser",
    "DeviceDenoiser",
    "Enqueue",
    "Keep",
    "KeptBytes",
    "Library",
    "MakeDenoiser",
    "NetworkGraphs",
    "NetworkSource",
    "Precision",
    "StepInput",
    "Target",
    "tensor_dtype",
]
