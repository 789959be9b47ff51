"""The processor, as compiled code depends on it."""

from __future__ import annotations

import hashlib
import platform
from functools import lru_cache

# Of /proc/cpuinfo: the model, and the instructions that it has (flags on x86, Features on ARM).
_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "CPU part", "Features")


@lru_cache(maxsize=1)
def processor() -> str:
    """What the first processor says of its model and its instructions, as sha256; equal for equal processors."""
    return hashlib.sha256("\n".join(_described()).encode()).hexdigest()


def has_vnni() -> bool:
    """Whether it adds products of 8 bits in 32. Other processors than x86 are taken to."""
    flags = {word for line in _described() if line.startswith("flags=") for word in line[6:].split()}
    return not flags or bool(flags & {"avx512_vnni", "avx_vnni"})


@lru_cache(maxsize=1)
def _described() -> list[str]:
    found = [platform.machine()]
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if not line.strip():
                    break
                name, _, value = line.partition(":")
                if name.strip() in _FIELDS:
                    found.append(f"{name.strip()}={' '.join(sorted(value.split()))}")
    except OSError:
        found.append(platform.processor())
    return found
