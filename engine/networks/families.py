"""What a diffusers configuration tells of a network's state and conditions. ADD A FAMILY'S CLASS AND CONDITIONS here.

    addition_embed_type "text_time"     text_embeds, time_ids          SDXL
    time_cond_proj_dim                  timestep_cond                  consistency models: from the guidance scale
    class_embed_type                    class_labels as numbers        "projection", "timestep", "identity"
    encoder_hid_dim_type "ip_image_proj"  image_embeds_0, …            IP-Adapters
    use_additional_conditions           resolution, aspect_ratio       PixArt
    in_channels above those predicted   asked of the user              inpainting, super-resolution: concat_to_state

`config` is a mapping, or an object with attributes, as modules hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skipstep.errors import InputError, ModelFormatError, check_integer
from skipstep.networks.condition import MAX_SIDE, Condition

# The networks that a configuration file may name: a name from a file never reaches an import.
NETWORK_CLASSES = (
    *("UNet2DModel", "UNet2DConditionModel", "UNet1DModel"),
    *("DiTTransformer2DModel", "PixArtTransformer2DModel", "Transformer2DModel"),
)
# What those that cannot be called with a state, a timestep and conditions alone read beside them.
_READ_BESIDE = {
    "SD3Transformer2DModel": "prompts and image as one joint sequence, with pooled projections",
    "FluxTransformer2DModel": "the image as a packed sequence, with the positions of its rotary tables",
}
_UNKNOWN_TRANSFORMER = "packed sequences, rotary tables or other inputs of its own"
# A transformer's norms by norm_type: with classes, and with prompts.
_CLASS_NORM, _PROMPT_NORM = "ada_norm_zero", "ada_norm_single"
_REMEDY = "correct the network's config"
# How many tokens a prompt has where a folder has no tokenizer: what every CLIP text encoder is given.
_CLIP_TOKENS = 77
# PixArt's pipelines cut prompts here, whatever its tokenizer would take.
_PIXART_TOKENS = 120
# Embeddings that a state or its prompts alone are enough for.
_KNOWN_ADDITIONS = (None, "text", "text_time")
_KNOWN_PROJECTIONS = (None, "text_proj", "ip_image_proj")
_TIME_IDS = 6


def told(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def check_class(class_name: Any, config: Any, where: str) -> None:
    """Raise ModelFormatError for a class of diffusers that is not called with a state, a timestep and conditions."""
    norm, is_transformer = told(config, "norm_type"), "Transformer" in str(class_name)
    wrap = "wrap it in a module forward(sample, timestep, …) that makes the rest, and pass that to Engine.build"
    if class_name == "Transformer2DModel" and (
        norm not in (_CLASS_NORM, _PROMPT_NORM) or told(config, "patch_size") is None
    ):
        raise ModelFormatError(
            got=f"{where}, with norm_type={norm!r} and patch_size={told(config, 'patch_size')!r}",
            expected=f"patches, and norm_type {_CLASS_NORM!r} or {_PROMPT_NORM!r}, which read a timestep",
            remedy=wrap,
        )
    if class_name in NETWORK_CLASSES:
        return
    beside = f", which reads {_READ_BESIDE.get(class_name, _UNKNOWN_TRANSFORMER)}" if is_transformer else ""
    raise ModelFormatError(
        got=f"{where}{beside}",
        expected=f"one of {', '.join(NETWORK_CLASSES)}",
        remedy=wrap if is_transformer else "load the network yourself and pass the module to Engine.build",
    )


def check_module(module: Any) -> None:
    """As check_class, for a transformer of diffusers that was loaded already; any other module is called as it is."""
    name = type(module).__name__
    if type(module).__module__.startswith("diffusers.") and "Transformer" in name:
        check_class(name, getattr(module, "config", None), f"a {name}")


def classes_in_table(config: Any) -> tuple[int | None, int | None]:
    """How many classes a network embeds, "no class" included, and the label of that where the configuration says."""
    embedded, null = told(config, "num_class_embeds"), None
    if told(config, "norm_type") == _CLASS_NORM:
        count = _size(config, "num_embeds_ada_norm")
        embedded, null = count + 1, count
    return embedded, null


def config_conditions(config: Any, given: Mapping[str, Condition], module: Any = None) -> dict[str, Condition]:
    """The conditions that the configuration tells, completed and overridden by `given`. Raises InputError where it
    names some that are not in `given` and that it does not describe."""
    found: dict[str, Condition] = {}
    _check_described(config, given)
    if told(config, "addition_embed_type") == "text_time":
        width = _size(config, "projection_class_embeddings_input_dim")
        each = _size(config, "addition_time_embed_dim")
        if "text_embeds" not in given and width <= _TIME_IDS * each:
            raise InputError(
                got=f"projection_class_embeddings_input_dim={width} beside addition_time_embed_dim={each}",
                expected=f"room for text_embeds beside {_TIME_IDS} time_ids",
                remedy="pass conditions={'text_embeds': Condition((width,)), 'time_ids': Condition((count,))}",
            )
        if "text_embeds" not in given:
            found["text_embeds"] = Condition((width - _TIME_IDS * each,))
        found["time_ids"] = Condition((_TIME_IDS,), null="same")
    if told(config, "time_cond_proj_dim") is not None:
        found["timestep_cond"] = Condition((_size(config, "time_cond_proj_dim"),), from_guidance="embedding")
    kind = told(config, "class_embed_type")
    if kind in ("projection", "simple_projection"):
        found["class_labels"] = Condition((_size(config, "projection_class_embeddings_input_dim"),))
    elif kind == "timestep":
        found["class_labels"] = Condition((), null="same")
    elif kind == "identity":
        first = (told(config, "block_out_channels") or (None,))[0]
        width = check_integer("block_out_channels", first, low=1, high=MAX_SIDE // 4, remedy=_REMEDY)
        found["class_labels"] = Condition((4 * width,))
    if told(config, "norm_type") == _PROMPT_NORM:
        taken = told(config, "use_additional_conditions")
        if taken or (taken is None and told(config, "sample_size") == 128):
            found |= {"resolution": Condition((2,), null="same"), "aspect_ratio": Condition((1,), null="same")}
    if told(config, "encoder_hid_dim_type") == "ip_image_proj":
        found |= _image_embeds(module, given)
    return found | dict(given)


def _check_described(config: Any, given: Mapping[str, Condition]) -> None:
    for key, known in (("addition_embed_type", _KNOWN_ADDITIONS), ("encoder_hid_dim_type", _KNOWN_PROJECTIONS)):
        value = told(config, key)
        if value not in known and "image_embeds" not in given:
            raise InputError(
                got=f"{key}={value!r}, which takes conditions that the configuration does not describe",
                expected="image_embeds among the conditions",
                remedy="pass conditions={'image_embeds': Condition((width,))} with the image encoder's width, or wrap "
                "the network in a module that computes the rest",
            )


def _image_embeds(module: Any, given: Mapping[str, Condition]) -> dict[str, Condition]:
    """IP-Adapters read a list of embeddings, one for each adapter; zeros stand for no image."""
    if any(name.startswith("image_embeds") for name in given):
        return {}
    layers = getattr(getattr(module, "encoder_hid_proj", None), "image_projection_layers", ())
    widths: list[Any] = [getattr(getattr(layer, "image_embeds", None), "in_features", None) for layer in layers]
    if not widths or None in widths:
        raise InputError(
            got="encoder_hid_dim_type='ip_image_proj' with image embeddings of unknown shape",
            expected="the shape of those of each adapter",
            remedy="pass conditions={'image_embeds_0': Condition((images, tokens, width), null=0.0)}",
        )
    return {f"image_embeds_{i}": Condition((1, width), null=0.0) for i, width in enumerate(widths)}


def state_shape(config: Any, class_name: str, conditions: Mapping[str, Condition]) -> tuple[int, ...] | None:
    """(channels, *sides) of the state; None where the configuration does not say. Raises InputError where the network
    reads channels that are neither the state's nor of a condition."""
    size, channels = told(config, "sample_size"), told(config, "in_channels")
    # A single number is each side's; of videos the number of frames is not there.
    axes = 1 if "1D" in class_name else None if "3D" in class_name else 2
    sides = tuple(size) if isinstance(size, tuple | list) else (size,) * (axes or 0)
    if channels is None or size is None or len(sides) != (axes or len(sides)) or not sides:
        return None
    sides = tuple(check_integer("sample_size", side, low=1, high=MAX_SIDE, remedy=_REMEDY) for side in sides)
    channels = check_integer("in_channels", channels, low=1, high=MAX_SIDE, remedy=_REMEDY)
    state = channels - sum(each.shape[0] for each in conditions.values() if each.concat_to_state)
    predicted = told(config, "out_channels")
    if predicted is None or predicted in (state, 2 * state):
        return state, *sides
    predicted = check_integer("out_channels", predicted, low=1, high=MAX_SIDE, remedy=_REMEDY)
    if state > predicted:
        shape = (state - predicted, *sides)
        raise InputError(
            got=f"a {class_name} that reads {channels} channels and predicts {predicted}",
            expected=f"the other {state - predicted} channels as conditions",
            remedy=f"pass conditions={{'concatenated': Condition({shape}, null='same', concat_to_state=True)}}, in the "
            "order in which the network reads them where there are several",
        )
    raise InputError(
        got=f"a {class_name} that predicts {predicted} channels for a state of {state}",
        expected=f"{state}, or {2 * state} where the variance is learned",
        remedy="check in_channels and out_channels of config.json, and the conditions with concat_to_state=True",
    )


def prompt_width(config: Any) -> int | None:
    """Of the prompt embeddings that a network attends to; None where it attends to none."""
    key = "encoder_hid_dim" if told(config, "encoder_hid_dim_type") == "text_proj" else "cross_attention_dim"
    if told(config, "norm_type") == _PROMPT_NORM and told(config, "caption_channels") is not None:
        key = "caption_channels"
    told_width: Any = told(config, key)
    width: int | None = told_width[0] if isinstance(told_width, tuple | list) and told_width else told_width
    return width


def prompt_tokens(config: Any, tokenizer_says: Any) -> Any:
    """How many tokens a prompt has; None stands for a folder without tokenizer."""
    if told(config, "norm_type") == _PROMPT_NORM:
        return _PIXART_TOKENS
    return _CLIP_TOKENS if tokenizer_says is None else tokenizer_says


def takes_fractional_timesteps(config: Any) -> bool:
    """Whether a diffusers configuration names a time embedding that is a smooth function of the timestep."""
    if not isinstance(config, Mapping):
        return False
    smooth = config.get("norm_type") in (_CLASS_NORM, _PROMPT_NORM)
    return smooth or config.get("time_embedding_type") in ("positional", "fourier")


def _size(config: Any, key: str) -> int:
    return check_integer(key, told(config, key), low=1, high=MAX_SIDE, remedy=_REMEDY)
