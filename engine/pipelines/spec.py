"""What a bundle says of a pipeline's parts; their files are told by their names.

pipeline/pipeline.json       this
pipeline/tokenizer-N.json    one for each text encoder, as the `tokenizers` library writes it
pipeline/text-N.onnx         token ids [B, L] to embeddings, and pooled ones where the network reads them
pipeline/decoder.onnx        latents to pictures
pipeline/encoder.onnx        pictures to the mean and the deviation of their latents
pipeline/preview.onnx        latents to pictures in less time, and less exactly
pipeline/checker.onnx        pictures to what is above 0 where the safety checker refuses one
pipeline/golden.safetensors  a prompt's embeddings, and the picture of some latents
"""

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Final

from skipstep.networks.condition import MAX_SIDE
from skipstep.storage.untrusted import (
    ADDED_LATER,
    Length,
    Within,
    malformed,
    own_rules,
    parse_json,
    read_dataclass,
    read_schema,
)

FOLDER: Final = "pipeline"
SPEC_FILE: Final = f"{FOLDER}/pipeline.json"
GOLDEN_FILE: Final = f"{FOLDER}/golden.safetensors"
SCHEMA: Final = 1
UPSCALER: Final = "StableDiffusionLatentUpscalePipeline"
# The condition that an inpainting network reads beside its state: the mask, and the latents of what it leaves.
MASKED: Final = "mask_and_masked_image"
# That of an upscaler: the latents of the small picture, each of its pixels four times.
ENLARGED: Final = "low_resolution_latents"
# Of prompts of several chunks: 1 for the tokens that are there.
MASK: Final = "encoder_attention_mask"
MAX_CHUNKS: Final = 32

_Token = Annotated[int, Within(0, 1 << 31)]
_Side = Annotated[int, Within(1, MAX_SIDE)]


@dataclass(frozen=True, slots=True)
class TextSpec:
    """A text encoder: prompts of `num_tokens`, filled up with `pad`. `pooled`: it gives pooled embeddings, too."""

    num_tokens: Annotated[int, Within(3, 1 << 16)]
    pad: _Token
    pooled: bool


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """`family` is the class of diffusers' pipeline. A latent pixel is `factor` pixels a side; a picture has `channels`;
    the graphs take latents of `tile`, (height, width).

    `zero_negative`: without a negative prompt, guidance contrasts with zeros and not with the empty prompt.
    `encodes`: there is an encoder. `chunks` of a prompt's tokens are read, and a mask says how many there are.
    `checks`: pixels a side that the safety checker reads, 0 without one. `previews`: there is a small decoder for them.
    `pixels`: there is no autoencoder, and the network's channels are the pixels of squares of `factor` a side, as
    torch's pixel_unshuffle orders them.
    """

    family: str
    texts: Annotated[tuple[TextSpec, ...], Length(0, 2)]
    factor: Annotated[int, Within(1, 256)]
    channels: Annotated[int, Within(1, 64)]
    tile: tuple[_Side, _Side]
    zero_negative: bool
    encodes: bool
    chunks: Annotated[int, Within(1, MAX_CHUNKS), ADDED_LATER] = 1
    checks: Annotated[int, Within(0, MAX_SIDE), ADDED_LATER] = 0
    previews: Annotated[bool, ADDED_LATER] = False
    pixels: Annotated[bool, ADDED_LATER] = False
    schema: int = SCHEMA

    def to_json(self) -> bytes:
        """The same contents always give the same bytes."""
        return (json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()

    def tile_of(self, part: str) -> tuple[int, int]:
        """What its graph takes, in latent pixels: an upscaler encodes pictures of half the size."""
        halves = 2 if part == "encoder" and self.family == UPSCALER else 1
        return self.tile[0] // halves, self.tile[1] // halves

    def graph_names(self) -> tuple[str, ...]:
        """Of the ONNX graphs, without folder and suffix."""
        texts = tuple(f"text-{i}" for i in range(len(self.texts)))
        own = {"decoder": not self.pixels, "encoder": self.encodes and not self.pixels}
        others = {**own, "checker": self.checks, "preview": self.previews}
        return (*texts, *(name for name, given in others.items() if given))

    def tokenizer_names(self) -> tuple[str, ...]:
        return tuple(f"{FOLDER}/tokenizer-{i}.json" for i in range(len(self.texts)))


def read_pipeline_spec(data: bytes, channels: int) -> PipelineSpec:
    """`channels` are those of the network's state. Raises BundleError, whatever the bytes."""
    value = parse_json(data, SPEC_FILE)
    read_schema(value, SPEC_FILE, known=SCHEMA, remedy="export the bundle again with this version")
    with own_rules(SPEC_FILE):
        spec = read_dataclass(PipelineSpec, value, SPEC_FILE)
    if spec.pixels and channels != spec.channels * spec.factor**2:
        raise malformed(SPEC_FILE, f"squares of {spec.channels * spec.factor**2} pixels for {channels} channels")
    return spec
