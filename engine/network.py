"""What a sampling loop must know of a network: the shape that it denoises and the labels that it takes.

out = network(x_t [N, C, H, W], timestep [N], class_labels [N])        out has the shape of x_t
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skipstep.errors import InputError


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """`sample_shape` is (C, H, W). `num_classes` counts the real classes; None: the network takes no labels.

    `null_label` is the label that stands for "no class", which classifier-free guidance needs; None: there is none.
    Raises InputError where these contradict each other.
    """

    sample_shape: tuple[int, int, int]
    num_classes: int | None = None
    null_label: int | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        shape = self.sample_shape
        if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
            raise InputError(
                got=f"sample_shape={shape!r}",
                expected="three positive integers (channels, height, width)",
                remedy="pass the shape of one sample, e.g. (3, 32, 32)",
            )
        if self.num_classes is None:
            if self.null_label is not None:
                raise InputError(
                    got=f"null_label={self.null_label} for a network without classes",
                    expected="num_classes beside it",
                    remedy="pass num_classes, or leave null_label out",
                )
        elif self.num_classes < 1 or (self.null_label is not None and self.null_label < 0):
            raise InputError(
                got=f"num_classes={self.num_classes}, null_label={self.null_label}",
                expected="at least one class, and a null label ≥ 0 where there is one",
                remedy="pass the numbers that the network was trained with",
            )

    @property
    def num_elements(self) -> int:
        """C·H·W."""
        channels, height, width = self.sample_shape
        return channels * height * width

    @classmethod
    def of_module(
        cls,
        module: Any,
        *,
        sample_shape: tuple[int, int, int] | None = None,
        num_classes: int | None = None,
        null_label: int | None = None,
    ) -> NetworkSpec:
        """Complete what the caller gave with a diffusers-style `module.config`; InputError if that falls short."""
        config = getattr(module, "config", None)
        if sample_shape is None:
            size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
            if size is None or channels is None:
                raise InputError(
                    got=f"a {type(module).__name__} without a config that holds in_channels and sample_size",
                    expected="the shape of one sample",
                    remedy="pass sample_shape=(channels, height, width)",
                )
            height, width = (size, size) if isinstance(size, int) else size
            sample_shape = (int(channels), int(height), int(width))
        if num_classes is None:
            embedded = getattr(config, "num_class_embeds", None)
            if embedded is not None:
                # A null label inside the table is not one of the classes.
                num_classes = int(embedded) - (null_label is not None and null_label < int(embedded))
        return cls(sample_shape, num_classes, null_label)
