"""The parts of a latent pipeline behind an engine: text encoders before a call, the autoencoder before and after it.

    prompts ─▶ tokenizers, text encoders ─▶ conditions ─▶ loop ─▶ latents ─▶ decoder ─▶ pictures
    picture ─▶ encoder ─▶ noised latents ──────────────────▲

Every part is an ONNX graph, which runs where the loop runs and as the backend has it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from skipstep.arrays import float32, host_floats
from skipstep.calls.inputs import refuse_inputs
from skipstep.calls.request import resolve_latents
from skipstep.errors import InputError, IntegrityError, check_choice
from skipstep.loops.contract import Sampler
from skipstep.networks.spec import NetworkSpec
from skipstep.pipelines.conditions import EMBEDS, POOLED, read_conditions
from skipstep.pipelines.pictures import (
    decode_tiled,
    encode_tiled,
    fit_preview,
    from_squares,
    read_pictures,
    squares,
    to_squares,
)
from skipstep.pipelines.prompts import Sections, plain_sections, weigh, weighted_sections
from skipstep.pipelines.spec import FOLDER, GOLDEN_FILE, MASK, SPEC_FILE, PipelineSpec
from skipstep.pipelines.tokenizer import PromptTokenizer
from skipstep.reporting import LOGGER

if TYPE_CHECKING:
    from skipstep.backends.denoiser import RunPart

Array = NDArray[np.float32]
# Names in the graphs.
TOKENS, LATENTS, PICTURES, MOMENTS = "tokens", "latents", "pictures", "moments"
MARGINS: Final = "margins"
DECODERS: Final = ("decoder", "preview")
# Some 20 MB of Stable Diffusion's.
_MAX_PROMPTS: Final = 64
# Processors sum a float32 product in different orders; of the largest value.
_GOLDEN_PROMPT, _GOLDEN_TOLERANCE = "a red apple", 1e-3


class MakePart(Protocol):
    """What runs a graph (skipstep.backends.registry.Backend.part)."""

    def __call__(self, graph: bytes, *, decodes: bool, tiled: bool) -> RunPart: ...


class Pipeline:
    """`read(name)` gives the bytes of a part's file, `pipeline/…`, and `make` of a graph what runs it, when it is first
    needed. `inputs`: what a part's graph reads beside what it is called with: the factors of LoRAs."""

    def __init__(
        self,
        spec: PipelineSpec,
        read: Callable[[str], bytes],
        make: MakePart,
        *,
        inputs: Mapping[str, Mapping[str, NDArray[Any]]] | None = None,
    ) -> None:
        self._inputs = inputs or {}
        self.spec, self._read, self._make = spec, read, make
        self._made: dict[str, Any] = {}
        self._prompts: dict[tuple[bytes, ...], dict[str, Array]] = {}
        self._lock = threading.RLock()

    @property
    def channels(self) -> int:
        return self.spec.channels

    @property
    def factor(self) -> int:
        return self.spec.factor

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Everything that a bundle holds of it, by name."""
        yield SPEC_FILE, self.spec.to_json()
        graphs = (f"{FOLDER}/{part}.onnx" for part in self.spec.graph_names())
        for name in (*self.spec.tokenizer_names(), *graphs, GOLDEN_FILE):
            yield name, self._read(name)

    def golden(self, latents: Array) -> dict[str, Array]:
        """What the parts give for a prompt and for these latents."""
        found = {LATENTS: latents, PICTURES: self._decoded(latents)}
        if self.spec.texts:
            found |= self.embed([(_GOLDEN_PROMPT,) * len(self.spec.texts)])
            found.pop(MASK, None)
        return found

    def check(self, rounded: float = 0.0) -> None:
        """Compute the golden prompt and picture again; `rounded`: the error that the engine's precision may make, of
        the largest value. Raises IntegrityError."""
        from safetensors.numpy import load

        expected = load(self._read(GOLDEN_FILE))
        for name, found in self.golden(expected[LATENTS]).items():
            kept = expected.get(name)
            error = np.inf if kept is None or kept.shape != found.shape else float(np.abs(found - kept).max())
            bound = max(_GOLDEN_TOLERANCE, rounded) * max(1.0, float(np.abs(found).max()))
            if not error <= bound:
                raise IntegrityError(
                    got=f"{name} of the pipeline's golden prompt or picture that are off by {error:.2g}",
                    expected=f"at most {bound:.2g}",
                    remedy="do not use this bundle here; export it again, and report the machine if it persists",
                )

    def conditions(self, network: NetworkSpec, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """`inputs` of a call with what the network reads in place of prompts and control images. Raises InputError."""
        return read_conditions(self.spec, self.embed, network, inputs)

    def embed(self, prompts: Sequence[tuple[str, ...]], *, weighted: bool = False) -> dict[str, Array]:
        """Of prompts, a text for each text encoder: EMBEDS `[B, chunks·L, D]` of all encoders side by side, POOLED of
        the last that gives them, of the first chunk, and of several chunks the MASK `[B, chunks·L]`."""
        read = weighted_sections if weighted else plain_sections
        distinct = {texts: self._encoded([read(text) for text in texts]) for texts in dict.fromkeys(prompts)}
        return {name: np.stack([distinct[texts][name] for texts in prompts]) for name in distinct[prompts[0]]}

    def _encoded(self, texts: Sequence[Sections]) -> dict[str, Array]:
        """A row of `embed`. Each prompt is encoded alone, so its numbers are the same beside any others, and what was
        encoded lately is kept by its tokens and weights."""
        given: list[tuple[NDArray[Any], NDArray[Any]]] = []
        tokenizers = [self._tokenizer(i) for i in range(len(texts))]
        split = [each.chunks(sections, self.spec.chunks) for each, sections in zip(tokenizers, texts, strict=True)]
        count = max(len(ids) for ids, _ in split)
        for tokenizer, (ids, weights) in zip(tokenizers, split, strict=True):
            blank, plain = (each.repeat(count - len(ids), axis=0) for each in tokenizer.chunks(plain_sections("")))
            given.append((np.concatenate([ids, blank]), np.concatenate([weights, plain])))
        key = tuple(array.tobytes() for each in given for array in each)
        with self._lock:
            kept = self._prompts.pop(key, None)
        found = kept or self._encode(given)
        with self._lock:
            if not any(self._inputs.values()):  # Factors of LoRAs change in place.
                self._prompts[key] = found
            while len(self._prompts) > _MAX_PROMPTS:
                self._prompts.pop(next(iter(self._prompts)))
        return found

    def _encode(self, given: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> dict[str, Array]:
        """Tokens and weights `[chunks, L]` for each encoder."""
        embeds, made, most = [], dict[str, Array](), self.spec.chunks
        for i, (text, (ids, weights)) in enumerate(zip(self.spec.texts, given, strict=True)):
            found = self._run(f"text-{i}", [EMBEDS, POOLED] if text.pooled else [EMBEDS], {TOKENS: ids})
            placed = np.zeros((most, *found[EMBEDS].shape[1:]), np.float32)
            placed[: len(ids)] = weigh(found[EMBEDS], weights)
            embeds.append(placed.reshape(-1, placed.shape[-1]))
            if text.pooled:
                made[POOLED] = found[POOLED][0]
        made[EMBEDS] = np.concatenate(embeds, axis=-1)
        if most > 1:
            made[MASK] = np.repeat(np.arange(most) < len(ids), ids.shape[1]).astype(np.float32)
        return made

    def decode(self, latents: Any) -> Array:
        """Pictures float32 `[B, C, H, W]` in [-1, 1] of latents, NumPy or a tensor. Those that the safety checker
        refuses are black, and a warning says which. Raises NonFiniteError."""
        made = self._decoded(latents)
        if self.spec.checks:
            given = {PICTURES: squares(made, self.spec.checks)}
            refused = np.flatnonzero(self._run("checker", [MARGINS], given)[MARGINS] > 0)
            if refused.size:
                LOGGER.warning("the safety checker refuses pictures %s of %d: black", refused.tolist(), len(made))
                made[refused] = -1.0
        return made

    def _decoded(self, latents: Any, part: str = "decoder") -> Array:
        values = np.ascontiguousarray(float32(host_floats("latents", latents)))
        if self.spec.pixels:
            return from_squares(values, self.factor).clip(-1.0, 1.0)
        made = decode_tiled(self._graph(part, PICTURES, LATENTS), values, tile=self.spec.tile, factor=self.factor)
        return made.clip(-1.0, 1.0)

    def preview(self, latents: Any) -> Array:
        """As `decode`, quickly: by the pipeline's small decoder, else a pixel for each of the latents."""
        if self.spec.previews or self.spec.pixels:
            return self._decoded(latents, "preview")

        def fit() -> Array:
            graph = self._graph("decoder", PICTURES, LATENTS)
            return fit_preview(graph, channels=latents.shape[1], tile=self.spec.tile, factor=self.factor)

        colours: Array = self._held("linear preview", fit)
        made = np.einsum("bchw,cd->bdhw", host_floats("latents", latents), colours[:-1]) + colours[-1][:, None, None]
        return float32(made.clip(-1.0, 1.0))

    def moments(self, pictures: Array) -> tuple[Array, Array]:
        """Mean and deviation of the latents of pictures in [-1, 1]. Raises InputError, NonFiniteError."""
        if not self.spec.encodes:
            raise InputError(
                got=f"a picture for a {self.spec.family} without an encoder", expected="latents", remedy="pass x_T="
            )
        if self.spec.pixels:
            latents = to_squares(pictures, self.factor)
            return latents, np.zeros_like(latents)
        graph = self._graph("encoder", MOMENTS, PICTURES)
        return encode_tiled(graph, pictures, tile=self.spec.tile_of("encoder"), factor=self.factor)

    def _graph(self, part: str, output: str, given: str) -> Callable[[Array], Array]:
        return lambda values: float32(self._run(part, [output], {given: values})[output])

    def _run(self, part: str, outputs: Sequence[str], given: Mapping[str, NDArray[Any]]) -> Mapping[str, Any]:
        def made() -> RunPart:
            graph, decodes = self._read(f"{FOLDER}/{part}.onnx"), part in DECODERS
            return self._make(graph, decodes=decodes, tiled=decodes or part == "encoder")

        run: RunPart = self._held(part, made)
        return run(outputs, {**self._inputs.get(part, {}), **given})

    def _tokenizer(self, i: int) -> PromptTokenizer:
        name = self.spec.tokenizer_names()[i]
        made: PromptTokenizer = self._held(
            name, lambda: PromptTokenizer(self._read(name).decode("utf-8", "replace"), self.spec.texts[i])
        )
        return made

    def _held(self, name: str, make: Callable[[], Any]) -> Any:
        with self._lock:
            if name not in self._made:
                self._made[name] = make()
            return self._made[name]


_OUTPUTS: Final = ("np", "pil")


def encode(engine: Sampler, image: Any) -> Array:
    """Latents `[B, *sample_shape]` of pictures, the mean of what the encoder gives: PIL pictures, or float32
    `[B, C, H, W]` in [-1, 1]. Raises InputError, NonFiniteError."""
    pipeline = _pipeline_of(engine)
    height, width = (side * pipeline.factor for side in engine.network.sample_shape[1:])
    pictures = read_pictures("image", image, channels=pipeline.channels, size=(height, width))
    latents: Array = pipeline.moments(pictures)[0]
    return latents


def decode(engine: Sampler, latents: Any, *, output_type: str = "np") -> Any:
    """Pictures of latents `[B, *sample_shape]`: float32 `[B, C, H, W]` in [-1, 1], or a list of PIL pictures.

    Raises InputError, NonFiniteError.
    """
    return _pictures(engine, latents, output_type, "decode")


def preview(engine: Sampler, latents: Any, *, output_type: str = "np") -> Any:
    """As `decode`, quickly, such as of the x0 in a StepEvent or a Trajectory. The small decoder that preview= named at
    build makes them; else a linear map gives a pixel for each of the latents, and is fitted to the decoder when it is
    first needed, in the time of one picture. The safety checker does not see them. Raises InputError."""
    return _pictures(engine, latents, output_type, "preview")


def _pictures(engine: Sampler, latents: Any, output_type: str, by: str) -> Any:
    check_choice("output_type", output_type, _OUTPUTS)
    make = getattr(_pipeline_of(engine), by)
    pictures = make(resolve_latents(latents, engine.network, name="latents"))
    if output_type == "np":
        return pictures
    from skipstep.calls.images import to_pil

    return to_pil(pictures)


def _pipeline_of(engine: Sampler) -> Any:
    engine.runner.check()
    pipeline = engine.runner.pipeline
    if pipeline is None:
        refuse_inputs({"image": True})
    return pipeline
