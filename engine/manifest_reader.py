"""Reading a manifest, which nobody has vouched for yet.

Every field is of the expected type and within bounds, every name stays inside the folder, and what is not understood is
refused rather than ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from skipstep.errors import BundleError, InputError, SkipstepError
from skipstep.files import check_relative_name
from skipstep.kernels.statistics import Thresholding
from skipstep.loop_table import LoopFeatures
from skipstep.manifest import (
    FILE_NAME,
    SCHEMA,
    EngineEntry,
    FileEntry,
    GoldenEntry,
    KernelEntry,
    LoopEntry,
    Manifest,
    PlanEntry,
)
from skipstep.network import NetworkSpec

_MAX_FILE_BYTES = 64 << 30
_MAX_ITEMS = 4096
_MAX_TEXT = 4096
_MAX_SIDE = 1 << 16

T = TypeVar("T")


def parse_manifest(data: bytes) -> Manifest:
    """Raises BundleError, IntegrityError for a name that leads out of the folder; nothing else, whatever the bytes."""
    try:
        contents = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError, MemoryError) as error:
        raise _malformed("the file", f"no JSON ({error})") from error
    top = _Fields(contents, "manifest")
    schema = top.integer("schema", low=1)
    if schema != SCHEMA:
        raise BundleError(
            got=f"a bundle of schema {schema}",
            expected=f"schema {SCHEMA}, which this version of skipstep reads",
            remedy="upgrade skipstep" if schema > SCHEMA else "export the bundle again",
        )
    try:
        manifest = _manifest(top)
    except InputError as error:  # NetworkSpec's own rules.
        raise _malformed("network", error.got) from error
    top.finish()
    _check_references(manifest)
    return manifest


def _manifest(top: _Fields) -> Manifest:
    return Manifest(
        schema=SCHEMA,
        model=top.text("model"),
        digest=top.hexadecimal("digest", 64),
        license=top.text("license"),
        network=top.nested("network", _network),
        batch_sizes=tuple(top.each("batch_sizes", lambda v, w: _integer(v, w, 1, _MAX_ITEMS))),
        plans=tuple(top.each("plans", _object(_plan))),
        graphs=top.mapping("graphs", _file_name),
        loops=tuple(top.each("loops", _object(_loop))),
        tables=_file_name(top.take("tables"), "tables"),
        golden=top.optional("golden", _object(_golden)),
        files=top.mapping("files", _object(_file)),
        tools=top.mapping("tools", _text),
        partition=top.mapping("partition", _plain),
        defaults=top.optional("defaults", lambda v, w: _Fields(v, w).all(_plain)),
        default_schedule=top.optional("default_schedule", lambda v, w: _integer(v, w, 0, _MAX_ITEMS)),
        engines=tuple(top.each("engines", _object(_engine))),
        kernels=tuple(top.each("kernels", _object(_kernel))),
    )


def _check_references(manifest: Manifest) -> None:
    """Every file that is named has an entry, and every plan that is named is there."""
    for name in manifest.files:
        check_relative_name(name)
    named = {
        manifest.tables,
        *manifest.graphs.values(),
        *(each.file for group in (manifest.loops, manifest.engines, manifest.kernels) for each in group),
        *([] if manifest.golden is None else [manifest.golden.file]),
    }
    for name in sorted(named - manifest.files.keys()):
        raise _malformed("files", f"no entry for {name!r}, which the manifest uses")
    keys = [plan.key for plan in manifest.plans]
    if len(set(keys)) != len(keys):
        raise _malformed("plans", "two plans of one key")
    if manifest.golden is not None and manifest.golden.plan not in keys:
        raise _malformed("golden", f"the plan {manifest.golden.plan!r}, which is not among plans")
    if not manifest.batch_sizes or not manifest.plans or not manifest.loops:
        raise _malformed("plans, loops or batch_sizes", "none")


def _network(fields: _Fields) -> NetworkSpec:
    def sides(value: Any, where: str) -> tuple[int, ...]:
        return tuple(_integer(each, where, 1, _MAX_SIDE) for each in _list(value, where))

    shape = sides(fields.take("sample_shape"), "sample_shape")
    prompt = fields.optional("prompt_shape", sides)
    if len(shape) != 3 or math.prod(shape) > 1 << 28 or (prompt is not None and len(prompt) != 2):
        raise _malformed("network", f"sample_shape {list(shape)}, prompt_shape {prompt}")
    names = fields.optional("class_names", lambda v, w: tuple(_text(each, w) for each in _list(v, w)))
    return NetworkSpec(
        sample_shape=(shape[0], shape[1], shape[2]),
        num_classes=fields.optional("num_classes", lambda v, w: _integer(v, w, 1, 1 << 31)),
        null_label=fields.optional("null_label", lambda v, w: _integer(v, w, 0, 1 << 31)),
        class_names=names,
        fractional_timesteps=fields.boolean("fractional_timesteps"),
        learns_variance=fields.boolean("learns_variance"),
        prompt_shape=None if prompt is None else (prompt[0], prompt[1]),
    )


def _plan(fields: _Fields) -> PlanEntry:
    return PlanEntry(
        key=fields.hexadecimal("key", 16),
        schedule=fields.integer("schedule", low=0),
        options=fields.nested("options", lambda inner: inner.all(_plain)),
    )


def _loop(fields: _Fields) -> LoopEntry:
    def features(inner: _Fields) -> LoopFeatures:
        thresholding = inner.optional("thresholding", _object(_thresholding))
        return LoopFeatures(**inner.all(_boolean), thresholding=thresholding)

    try:
        return LoopEntry(_file_name(fields.take("file"), "loops.file"), fields.nested("features", features))
    except TypeError as error:
        raise _malformed("loops.features", str(error)) from error


def _thresholding(fields: _Fields) -> Thresholding:
    quantile = fields.number("quantile", low=0.0, high=1.0)
    maximum = fields.optional("maximum", lambda v, w: _number(v, w, 1.0, math.inf))
    return Thresholding(quantile, math.inf if maximum is None else maximum)


def _engine(fields: _Fields) -> EngineEntry:
    return EngineEntry(
        file=_file_name(fields.take("file"), "engines.file"),
        target=fields.text("target"),
        precision=fields.text("precision"),
        facts=fields.nested("facts", lambda inner: inner.all(_plain)),
    )


def _kernel(fields: _Fields) -> KernelEntry:
    return KernelEntry(
        file=_file_name(fields.take("file"), "kernels.file"),
        facts=fields.nested("facts", lambda inner: inner.all(_plain)),
    )


def _golden(fields: _Fields) -> GoldenEntry:
    def integers(high: int) -> Callable[[Any, str], tuple[int, ...]]:
        return lambda v, w: tuple(_integer(each, w, 0, high) for each in _list(v, w))

    golden = GoldenEntry(
        file=_file_name(fields.take("file"), "golden.file"),
        plan=fields.hexadecimal("plan", 16),
        seeds=integers(2**64 - 1)(fields.take("seeds"), "golden.seeds"),
        class_labels=fields.optional("class_labels", integers(1 << 31)),
        guidance_scale=fields.optional("guidance_scale", lambda v, w: _number(v, w, -1e6, 1e6)),
        tolerance=fields.number("tolerance", low=0.0, high=1.0),
    )
    if not golden.seeds or len(golden.seeds) > 64:
        raise _malformed("golden.seeds", f"{len(golden.seeds)} seeds")
    return golden


def _file(fields: _Fields) -> FileEntry:
    return FileEntry(fields.integer("size", low=0, high=_MAX_FILE_BYTES), fields.hexadecimal("sha256", 64))


class _Fields:
    """A JSON object whose fields are taken one by one; what is left in the end is refused."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _malformed(where, f"a JSON {type(value).__name__} where an object belongs")
        if len(value) > _MAX_ITEMS:
            raise _malformed(where, f"{len(value)} fields")
        self._left = dict(value)
        self._where = where

    def take(self, name: str) -> Any:
        if name not in self._left:
            raise _malformed(self._where, f"no field {name!r}")
        return self._left.pop(name)

    def optional(self, name: str, read: Callable[[Any, str], T]) -> T | None:
        value = self.take(name)
        return None if value is None else read(value, f"{self._where}.{name}")

    def text(self, name: str) -> str:
        return _text(self.take(name), f"{self._where}.{name}")

    def hexadecimal(self, name: str, digits: int) -> str:
        value = self.text(name)
        if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
            raise _malformed(f"{self._where}.{name}", f"{value!r:.80} where {digits} hexadecimal digits belong")
        return value

    def integer(self, name: str, *, low: int, high: int = 1 << 53) -> int:
        return _integer(self.take(name), f"{self._where}.{name}", low, high)

    def number(self, name: str, *, low: float, high: float) -> float:
        return _number(self.take(name), f"{self._where}.{name}", low, high)

    def boolean(self, name: str) -> bool:
        return _boolean(self.take(name), f"{self._where}.{name}")

    def nested(self, name: str, read: Callable[[_Fields], T]) -> T:
        return _object(read)(self.take(name), f"{self._where}.{name}")

    def each(self, name: str, read: Callable[[Any, str], T]) -> list[T]:
        where = f"{self._where}.{name}"
        return [read(value, f"{where}[{i}]") for i, value in enumerate(_list(self.take(name), where))]

    def mapping(self, name: str, read: Callable[[Any, str], T]) -> dict[str, T]:
        return self.nested(name, lambda inner: inner.all(read))

    def all(self, read: Callable[[Any, str], T]) -> dict[str, T]:
        """Every field that is left."""
        found = {name: read(value, f"{self._where}.{name:.80}") for name, value in self._left.items()}
        self._left = {}
        return found

    def finish(self) -> None:
        for name in self._left:
            raise _malformed(self._where, f"the field {name!r:.80}, which schema {SCHEMA} does not have")


def _object(read: Callable[[_Fields], T]) -> Callable[[Any, str], T]:
    """A reader of JSON objects that leaves no field unread."""

    def whole(value: Any, where: str) -> T:
        fields = _Fields(value, where)
        result = read(fields)
        fields.finish()
        return result

    return whole


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise _malformed(where, f"{value!r:.80} where a text belongs")
    return value


def _integer(value: Any, where: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _malformed(where, f"{value!r:.80} where an integer from {low} to {high} belongs")
    return value


def _number(value: Any, where: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _malformed(where, f"{value!r:.80} where a number from {low:g} to {high:g} belongs")
    return float(value)


def _boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise _malformed(where, f"{value!r:.80} where true or false belongs")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > _MAX_ITEMS:
        raise _malformed(where, f"{type(value).__name__} where a list of at most {_MAX_ITEMS} belongs")
    return value


def _file_name(value: Any, where: str) -> str:
    return check_relative_name(_text(value, where))


def _plain(value: Any, where: str) -> Any:
    """Any JSON of moderate size, for parts whose own readers check them."""
    if isinstance(value, dict):
        return _Fields(value, where).all(_plain)
    if isinstance(value, list):
        return [_plain(each, where) for each in _list(value, where)]
    if isinstance(value, float) and not math.isfinite(value):
        raise _malformed(where, "a number too large to be one")
    return _text(value, where) if isinstance(value, str) else value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _malformed(where: str, got: str) -> SkipstepError:
    return BundleError(
        got=f"{FILE_NAME} with {got} in {where}",
        expected="a manifest that skipstep export wrote",
        remedy="export the bundle again, or copy it again from where it came",
    )
