"""The parts of a latent pipeline behind an engine: text encoders before a call, the autoencoder before and after it.

    prompts ─▶ tokenizers, text encoders ─▶ conditions ─▶ loop ─▶ latents ─▶ decoder ─▶ pictures
    picture ─▶ encoder ─▶ noised latents ──────────────────▲

Every part is an ONNX graph that ONNX Runtime runs on the CPU in float32, wherever the loop is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

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
from skipstep.pipelines.prompts import plain_sections, weigh, weighted_sections
from skipstep.pipelines.spec import FOLDER, GOLDEN_FILE, MASK, SPEC_FILE, PipelineSpec
from skipstep.pipelines.tokenizer import PromptTokenizer
from skipstep.reporting import LOGGER

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = NDArray[np.float32]
# Names in the graphs.
TOKENS, LATENTS, PICTURES, MOMENTS = "tokens", "latents", "pictures", "moments"
MARGINS: Final = "margins"
# Processors sum a float32 product in different orders; of the largest value.
_GOLDEN_PROMPT, _GOLDEN_TOLERANCE = "a red apple", 1e-3


class Pipeline:
    """`read(name)` gives the bytes of a part's file, `pipeline/…`. Sessions are made when they are first needed.
    `inputs`: what a part's graph reads beside what it is called with: the factors of LoRAs."""

    def __init__(
        self,
        spec: PipelineSpec,
        read: Callable[[str], bytes],
        *,
        num_threads: int | None = None,
        inputs: Mapping[str, Mapping[str, NDArray[Any]]] | None = None,
    ) -> None:
        self._inputs = inputs or {}
        self.spec, self._read, self._num_threads = spec, read, num_threads
        self._made: dict[str, Any] = {}
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

    def check(self) -> None:
        """Compute the golden prompt and picture again. Raises IntegrityError."""
        from safetensors.numpy import load

        expected = load(self._read(GOLDEN_FILE))
        for name, found in self.golden(expected[LATENTS]).items():
            kept = expected.get(name)
            error = np.inf if kept is None or kept.shape != found.shape else float(np.abs(found - kept).max())
            bound = _GOLDEN_TOLERANCE * max(1.0, float(np.abs(found).max()))
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
        distinct = list(dict.fromkeys(prompts))
        most, read = self.spec.chunks, plain_sections
        if weighted:
            read = weighted_sections
        tokenizers = [self._tokenizer(i) for i in range(len(self.spec.texts))]
        split = [[each.chunks(read(texts[i]), most) for texts in distinct] for i, each in enumerate(tokenizers)]
        counts = [max(len(each[row][0]) for each in split) for row in range(len(distinct))]
        prompt, chunk = np.repeat(np.arange(len(distinct)), counts), np.concatenate([*map(np.arange, counts)])
        embeds, made = [], dict[str, Array]()
        for i, text in enumerate(self.spec.texts):
            empty, plain = tokenizers[i].chunks(plain_sections(""))
            ids = _filled([each for each, _ in split[i]], empty, counts)
            weights = _filled([each for _, each in split[i]], plain, counts)
            found = self._run(f"text-{i}", [EMBEDS, POOLED] if text.pooled else [EMBEDS], {TOKENS: ids})
            placed = np.zeros((len(distinct), most, *found[EMBEDS].shape[1:]), np.float32)
            placed[prompt, chunk] = weigh(found[EMBEDS], weights)
            embeds.append(placed.reshape(len(distinct), -1, placed.shape[-1]))
            if text.pooled:
                made[POOLED] = found[POOLED][chunk == 0]
        made[EMBEDS] = np.concatenate(embeds, axis=-1)
        if most > 1:
            made[MASK] = np.repeat(np.arange(most) < np.array(counts)[:, None], ids.shape[1], axis=1).astype(np.float32)
        rows = [distinct.index(each) for each in prompts]
        return {name: each[rows] for name, each in made.items()}

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
        from skipstep.backends.onnxruntime import make_session, run_session

        def session() -> InferenceSession:
            return make_session(
                self._read(f"{FOLDER}/{part}.onnx"), num_threads=self._num_threads, before_loop=part != "decoder"
            )

        return run_session(self._held(part, session), outputs, {**self._inputs.get(part, {}), **given})

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


def _filled(given: Sequence[NDArray[Any]], blank: NDArray[Any], counts: Sequence[int]) -> NDArray[Any]:
    """Chunks of all prompts, one after the other, so many of each."""
    counted = zip(given, counts, strict=True)
    return np.concatenate([part for own, count in counted for part in (own, blank.repeat(count - len(own), axis=0))])


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
