"""Prompts to token ids, by the `tokenizers` library alone: CLIP's byte-pair encoding, from tokenizer.json or from
vocab.json and merges.txt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from skipstep.errors import InputError, ModelFormatError, check_integer, optional_package
from skipstep.networks.weights import DOWNLOAD
from skipstep.pipelines.prompts import Sections
from skipstep.pipelines.spec import TextSpec
from skipstep.reporting import LOGGER
from skipstep.storage.untrusted import malformed, read_json_object

if TYPE_CHECKING:
    import tokenizers

CLASSES: Final = ("CLIPTokenizer", "CLIPTokenizerFast")
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS: Final = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_MAX_PROMPT: Final = 1 << 20


class PromptTokenizer:
    """One text encoder's tokenizer: chunks of start, tokens of the prompt, end, and padding up to `spec.num_tokens`."""

    def __init__(self, contents: str, spec: TextSpec) -> None:
        library = _library()
        try:
            self._tokenizer: tokenizers.Tokenizer = library.Tokenizer.from_str(contents)
        except Exception as error:  # The library has no class of its own for what it cannot read.
            raise malformed("a tokenizer's file", f"what the tokenizers library refuses ({error!s:.200})") from error
        # Its file may ask for either; both are done here, because what is cut has to be said.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._spec = spec
        ends = self._tokenizer.encode("").ids
        if len(ends) < 2:
            raise malformed("a tokenizer's file", "no start and end of a prompt")
        self._start, self._end = ends[0], ends[-1]

    def chunks(self, sections: Sections, most: int = 1) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids and weights `[n, num_tokens]` of a prompt's chunks, `most` of them; a warning quotes what is cut off."""
        room, shown = self._spec.num_tokens - 2, ""
        rows: list[list[tuple[int, float, int]]] = []  # Each token's id, its weight and its place in `shown`.
        for section in sections:
            tokens = []
            for text, weight in section:
                encoding = self._tokenizer.encode(text, add_special_tokens=False)
                places = (len(shown) + start for start, _ in encoding.offsets)
                tokens += [(token, weight, place) for token, place in zip(encoding.ids, places, strict=True)]
                shown += text
            rows += [tokens[i : i + room] for i in range(0, max(len(tokens), 1), room)]
        while len(rows) > 1 and not rows[-1]:
            rows.pop()
        cut = [token for row in rows[most:] for token in row]
        if cut:
            LOGGER.warning(
                "the prompt %.60r… is longer than the %d tokens that the text encoder reads; cut off: %r",
                shown,
                room * most,
                shown[cut[0][2] :],
            )
        ids = np.full((len(rows[:most]), self._spec.num_tokens), self._spec.pad, np.int64)
        weights = np.ones(ids.shape, np.float32)
        for i, row in enumerate(rows[:most]):
            ids[i, : len(row) + 2] = [self._start, *(token for token, _, _ in row), self._end]
            weights[i, 1 : len(row) + 1] = [weight for _, weight, _ in row]
        return ids, weights


def check_prompts(name: str, value: Any) -> list[str]:
    """A prompt or several as a list. Raises InputError."""
    prompts = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else []
    if not prompts or not all(isinstance(each, str) and len(each) <= _MAX_PROMPT for each in prompts):
        raise InputError(
            got=f"{name}={value!r:.80}",
            expected="a text, or a list of one text per sample",
            remedy=f"pass {name}='a red apple'",
        )
    try:
        for each in prompts:
            each.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            got=f"a {name} with half a character, {error.object[error.start : error.end]!r}",
            expected="text that can be written as UTF-8",
            remedy="decode its bytes with errors='replace'",
        ) from error
    return prompts


def read_tokenizer(folder: Path, *, pooled: bool) -> tuple[str, TextSpec]:
    """A tokenizer's folder as the contents of one file, and what is to be known of it.

    Raises ModelFormatError, MissingDependencyError.
    """
    config = read_json_object(folder / "tokenizer_config.json", remedy=DOWNLOAD)
    kind = config.get("tokenizer_class", CLASSES[0])
    if kind not in CLASSES:
        raise ModelFormatError(
            got=f"a {kind!r:.80} in {folder}",
            expected=f"CLIP's byte-pair tokenizer, {' or '.join(CLASSES)}",
            remedy="encode the prompts yourself, and build the engine of the unet folder with prompt_embeds=",
        )
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    for source in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        contents = read_json_object(source, remedy=DOWNLOAD) if source.exists() else {}
        special |= {name: _text(contents[name]) for name in special if contents.get(name) is not None}
    library, file = _library(), folder / "tokenizer.json"
    try:
        if file.exists():
            made: tokenizers.Tokenizer = library.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        else:
            made = _from_vocabulary(folder, special, library)
    except ModelFormatError:
        raise
    except Exception as error:  # As above.
        raise ModelFormatError(
            got=f"{folder} with a tokenizer that the tokenizers library refuses ({error!s:.200})",
            expected="a tokenizer.json that it wrote, or CLIP's vocab.json and merges.txt",
            remedy=DOWNLOAD,
        ) from error
    length = config.get("model_max_length")
    num_tokens = check_integer("model_max_length", length, low=3, high=1 << 16, remedy="correct tokenizer_config.json")
    pad = made.token_to_id(special["pad_token"])
    if pad is None or not made.encode("").ids[1:]:
        raise ModelFormatError(
            got=f"a tokenizer in {folder} without {special['pad_token']!r}, or without start and end",
            expected="CLIP's special tokens in the vocabulary",
            remedy=DOWNLOAD,
        )
    return made.to_str(), TextSpec(num_tokens, pad, pooled)


def _from_vocabulary(folder: Path, special: dict[str, str], library: Any) -> tokenizers.Tokenizer:
    from tokenizers import models, normalizers, pre_tokenizers, processors

    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    for path in (vocabulary, merges):
        if not path.exists():
            raise ModelFormatError(
                got=f"no {path.name} in {folder}",
                expected="tokenizer.json, or vocab.json and merges.txt",
                remedy=DOWNLOAD,
            )
    model = models.BPE.from_file(
        str(vocabulary), str(merges), unk_token=special["unk_token"], end_of_word_suffix="</w>"
    )
    made: tokenizers.Tokenizer = library.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(library.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(library.Regex(_WORDS), behavior="removed", invert=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    known = made.get_vocab()
    start, end = ((special[name], known[special[name]]) for name in ("bos_token", "eos_token"))
    made.post_processor = processors.RobertaProcessing(end, start, trim_offsets=False, add_prefix_space=False)
    made.add_special_tokens(list(dict.fromkeys(special.values())))
    return made


def _text(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def _library() -> Any:
    return optional_package("tokenizers", use="reads prompts", remedy="pip install 'skipstep[prompts]'")
