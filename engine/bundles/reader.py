"""Reading a manifest, which nobody has vouched for yet (skipstep.storage.untrusted has the rules)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from skipstep.bundles.manifest import (
    FILE_NAME,
    SCHEMA,
    EngineEntry,
    FileEntry,
    GoldenEntry,
    KernelEntry,
    Manifest,
    PlanEntry,
    SamplerEntry,
)
from skipstep.errors import BundleError, InputError
from skipstep.networks.spec import NetworkSpec
from skipstep.storage.atomic import check_relative_name
from skipstep.storage.untrusted import (
    MAX_ITEMS,
    Fields,
    malformed,
    parse_json,
    read_file_name,
    read_integer,
    read_list,
    read_number,
    read_object,
    read_plain,
    read_text,
)

_MAX_FILE_BYTES = 64 << 30
_MAX_SIDE = 1 << 16


def parse_manifest(data: bytes) -> Manifest:
    """Raises BundleError, IntegrityError for a name that leads out of the folder; nothing else, whatever the bytes."""
    top = Fields(parse_json(data, FILE_NAME), FILE_NAME)
    schema = top.integer("schema", low=1)
    if schema != SCHEMA:
        raise BundleError(
            got=f"a bundle of schema {schema}",
            expected=f"schema {SCHEMA}, which this version of skipstep reads",
            remedy="upgrade skipstep"
            if schema > SCHEMA
            else "export it again from the model with this version: skipstep export --overwrite",
        )
    try:
        manifest = _manifest(top)
    except InputError as error:  # NetworkSpec's own rules.
        raise malformed(f"{FILE_NAME}.network", error.got) from error
    top.finish()
    _check_references(manifest)
    return manifest


def _manifest(top: Fields) -> Manifest:
    return Manifest(
        schema=SCHEMA,
        model=top.text("model"),
        digest=top.hexadecimal("digest", 64),
        license=top.text("license"),
        network=top.nested("network", _network),
        batch_sizes=tuple(top.each("batch_sizes", lambda v, w: read_integer(v, w, 1, MAX_ITEMS))),
        plans=tuple(top.each("plans", read_object(_plan))),
        graphs=top.mapping("graphs", read_file_name),
        tables=read_file_name(top.take("tables"), f"{FILE_NAME}.tables"),
        golden=top.optional("golden", read_object(_golden)),
        files=top.mapping("files", read_object(_file)),
        tools=top.mapping("tools", read_text),
        partition=top.mapping("partition", read_plain),
        defaults=top.optional("defaults", lambda v, w: Fields(v, w).all(read_plain)),
        default_schedule=top.optional("default_schedule", lambda v, w: read_integer(v, w, 0, MAX_ITEMS)),
        engines=tuple(top.each("engines", read_object(_engine))),
        kernels=tuple(top.each("kernels", read_object(_kernel))),
        samplers=tuple(top.each("samplers", read_object(_sampler))),
        calibration=top.added("calibration", read_file_name),
    )


def _check_references(manifest: Manifest) -> None:
    """Every file that is named has an entry, and every plan that is named is there."""
    for name in manifest.files:
        check_relative_name(name)
    named = {
        manifest.tables,
        *manifest.graphs.values(),
        *(each.file for group in (manifest.engines, manifest.kernels, manifest.samplers) for each in group),
        *([] if manifest.golden is None else [manifest.golden.file]),
        *([] if manifest.calibration is None else [manifest.calibration]),
    }
    for name in sorted(named - manifest.files.keys()):
        raise malformed(f"{FILE_NAME}.files", f"no entry for {name!r}, which the manifest uses")
    keys = [plan.key for plan in manifest.plans]
    if len(set(keys)) != len(keys):
        raise malformed(f"{FILE_NAME}.plans", "two plans of one key")
    if manifest.golden is not None and manifest.golden.plan not in keys:
        raise malformed(f"{FILE_NAME}.golden", f"the plan {manifest.golden.plan!r}, which is not among plans")
    for sampler in manifest.samplers:
        if sampler.plan not in keys:
            raise malformed(f"{FILE_NAME}.samplers", f"the plan {sampler.plan!r}, which is not among plans")
    if not manifest.batch_sizes or not manifest.plans:
        raise malformed(f"{FILE_NAME}.plans or batch_sizes", "none")
    if "step" not in manifest.graphs:
        raise malformed(f"{FILE_NAME}.graphs", "no step network")


def _network(fields: Fields) -> NetworkSpec:
    def sides(value: Any, where: str) -> tuple[int, ...]:
        return tuple(read_integer(each, where, 1, _MAX_SIDE) for each in read_list(value, where))

    shape = sides(fields.take("sample_shape"), "sample_shape")
    prompt = fields.optional("prompt_shape", sides)
    if len(shape) != 3 or math.prod(shape) > 1 << 28 or (prompt is not None and len(prompt) != 2):
        raise malformed(f"{FILE_NAME}.network", f"sample_shape {list(shape)}, prompt_shape {prompt}")
    names = fields.optional("class_names", lambda v, w: tuple(read_text(each, w) for each in read_list(v, w)))
    return NetworkSpec(
        sample_shape=(shape[0], shape[1], shape[2]),
        num_classes=fields.optional("num_classes", lambda v, w: read_integer(v, w, 1, 1 << 31)),
        null_label=fields.optional("null_label", lambda v, w: read_integer(v, w, 0, 1 << 31)),
        class_names=names,
        fractional_timesteps=fields.boolean("fractional_timesteps"),
        learns_variance=fields.boolean("learns_variance"),
        prompt_shape=None if prompt is None else (prompt[0], prompt[1]),
    )


def _plan(fields: Fields) -> PlanEntry:
    return PlanEntry(
        key=fields.hexadecimal("key", 16),
        schedule=fields.integer("schedule", low=0),
        options=fields.nested("options", lambda inner: inner.all(read_plain)),
    )


def _sampler(fields: Fields) -> SamplerEntry:
    return SamplerEntry(
        file=read_file_name(fields.take("file"), "samplers.file"),
        plan=fields.hexadecimal("plan", 16),
        form=fields.text("form"),
        guided=fields.boolean("guided"),
    )


def _engine(fields: Fields) -> EngineEntry:
    return EngineEntry(
        file=read_file_name(fields.take("file"), "engines.file"),
        target=fields.text("target"),
        precision=fields.text("precision"),
        facts=fields.nested("facts", lambda inner: inner.all(read_plain)),
    )


def _kernel(fields: Fields) -> KernelEntry:
    return KernelEntry(
        file=read_file_name(fields.take("file"), "kernels.file"),
        facts=fields.nested("facts", lambda inner: inner.all(read_plain)),
    )


def _golden(fields: Fields) -> GoldenEntry:
    def integers(high: int) -> Callable[[Any, str], tuple[int, ...]]:
        return lambda v, w: tuple(read_integer(each, w, 0, high) for each in read_list(v, w))

    golden = GoldenEntry(
        file=read_file_name(fields.take("file"), "golden.file"),
        plan=fields.hexadecimal("plan", 16),
        seeds=integers(2**64 - 1)(fields.take("seeds"), "golden.seeds"),
        class_labels=fields.optional("class_labels", integers(1 << 31)),
        guidance_scale=fields.optional("guidance_scale", lambda v, w: read_number(v, w, -1e6, 1e6)),
        tolerance=fields.number("tolerance", low=0.0, high=1.0),
    )
    if not golden.seeds or len(golden.seeds) > 64:
        raise malformed(f"{FILE_NAME}.golden.seeds", f"{len(golden.seeds)} seeds")
    return golden


def _file(fields: Fields) -> FileEntry:
    return FileEntry(fields.integer("size", low=0, high=_MAX_FILE_BYTES), fields.hexadecimal("sha256", 64))
