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
from skipstep.pipelines.pictures import decode_tiled, encode_tiled, read_pictures
from skipstep.pipelines.spec import FOLDER, GOLDEN_FILE, SPEC_FILE, PipelineSpec
from skipstep.pipelines.tokenizer import PromptTokenizer, check_prompts

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = NDArray[np.float32]
# Names in the graphs.
TOKENS, EMBEDS, POOLED, LATENTS, PICTURES, MOMENTS = "tokens", "embeds", "pooled", "latents", "pictures", "moments"
# What a network reads of pooled embeddings, and of the picture's size.
# Processors sum a float32 product in different orders; of the largest value.
_GOLDEN_PROMPT, _GOLDEN_TOLERANCE = "a red apple", 1e-3
_TEXT_EMBEDS, _TIME_IDS = "text_embeds", "time_ids"


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
        found = {LATENTS: latents, PICTURES: self.decode(latents)}
        if self.spec.texts:
            embeds, pooled = self.embed([_GOLDEN_PROMPT])
            found |= {EMBEDS: embeds} | ({} if pooled is None else {POOLED: pooled})
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
        """`inputs` of a call with embeddings in place of its prompts. Raises InputError."""
        made = dict(inputs)
        prompt, negative = made.pop("prompt", None), made.pop("negative_prompt", None)
        if _TIME_IDS in network.all_conditions:
            height, width = (side * self.factor for side in network.sample_shape[1:])
            ids = np.array([height, width, 0, 0, height, width], np.float32)
            made["conditions"] = {_TIME_IDS: ids, **(made.get("conditions") or {})}
        if prompt is None and negative is None:
            return made
        if not self.spec.texts:
            raise InputError(
                got=f"a prompt for a {self.spec.family}, which reads none", expected="no prompt", remedy="leave it out"
            )
        if prompt is None or made.get("prompt_embeds") is not None:
            raise InputError(
                got="negative_prompt alone" if prompt is None else "prompt beside prompt_embeds",
                expected="one of prompt and prompt_embeds, and the negative in the same form",
                remedy="pass prompt=, or negative_prompt_embeds= beside prompt_embeds=",
            )
        self._add(made, "", prompt, self.embed(check_prompts("prompt", prompt)))
        scale = made.get("guidance_scale")
        if scale is None or network.takes_guidance or not np.any(np.asarray(scale) != 1.0):
            return made
        if negative is None and self.spec.zero_negative:
            embeds, pooled = self.embed([""])
            self._add(made, "negative_", "", (embeds * 0, None if pooled is None else pooled * 0))
        else:
            negative = "" if negative is None else negative
            self._add(made, "negative_", negative, self.embed(check_prompts("negative_prompt", negative)))
        return made

    def _add(self, made: dict[str, Any], half: str, given: Any, embedded: tuple[Array, Array | None]) -> None:
        """A single text's rows are for all samples."""
        row = 0 if isinstance(given, str) else slice(None)
        made[f"{half}prompt_embeds"] = embedded[0][row]
        if embedded[1] is not None:
            made[f"{half}conditions"] = {**(made.get(f"{half}conditions") or {}), _TEXT_EMBEDS: embedded[1][row]}

    def embed(self, prompts: Sequence[str]) -> tuple[Array, Array | None]:
        """`[B, L, D]` of all text encoders side by side, and the pooled embeddings of the last that has them."""
        distinct = list(dict.fromkeys(prompts))
        embeds, pooled = [], None
        for i, text in enumerate(self.spec.texts):
            ids = self._tokenizer(i).encode(distinct)
            outputs = [EMBEDS, POOLED] if text.pooled else [EMBEDS]
            found = self._run(f"text-{i}", outputs, {TOKENS: ids})
            embeds.append(found[EMBEDS])
            pooled = found.get(POOLED, pooled)
        rows = [distinct.index(prompt) for prompt in prompts]
        return np.concatenate(embeds, axis=-1)[rows], None if pooled is None else pooled[rows]

    def decode(self, latents: Any) -> Array:
        """Pictures float32 `[B, C, H, W]` in [-1, 1] of latents, NumPy or a tensor. Raises NonFiniteError."""
        values = np.ascontiguousarray(float32(host_floats("latents", latents)))
        made = decode_tiled(self._graph("decoder", PICTURES, LATENTS), values, tile=self.spec.tile, factor=self.factor)
        return made.clip(-1.0, 1.0)

    def moments(self, pictures: Array) -> tuple[Array, Array]:
        """Mean and deviation of the latents of pictures in [-1, 1]. Raises InputError, NonFiniteError."""
        if not self.spec.encodes:
            raise InputError(
                got=f"a picture for a {self.spec.family} without an encoder", expected="latents", remedy="pass x_T="
            )
        graph = self._graph("encoder", MOMENTS, PICTURES)
        return encode_tiled(graph, pictures, tile=self.spec.tile, factor=self.factor)

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
    check_choice("output_type", output_type, _OUTPUTS)
    pipeline = _pipeline_of(engine)
    pictures = pipeline.decode(resolve_latents(latents, engine.network, name="latents"))
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
