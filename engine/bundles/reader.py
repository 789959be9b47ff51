"""Reading an untrusted manifest: the schema number, every field by its type, then what parts say of each other."""

from __future__ import annotations

from skipstep.bundles.manifest import FILE_NAME, SCHEMA, Manifest
from skipstep.storage.untrusted import malformed, parse_json, read_dataclass, read_schema
from skipstep.storage.verified import check_relative_name


def parse_manifest(data: bytes) -> Manifest:
    """Raises BundleError, IntegrityError for a name that leads out of the folder; nothing else, whatever the bytes."""
    value = parse_json(data, FILE_NAME)
    read_schema(
        value,
        FILE_NAME,
        known=SCHEMA,
        remedy="export it again from the model with this version: skipstep export --overwrite",
    )
    manifest = read_dataclass(Manifest, value, FILE_NAME)
    _check_references(manifest)
    return manifest


def _check_references(manifest: Manifest) -> None:
    """Every file that is named has an entry, and every plan that is named is there."""
    for name in manifest.files:
        check_relative_name(name)
    named = {
        manifest.tables,
        *manifest.graphs.values(),
        *(each.file for group in (manifest.engines, manifest.kernels, manifest.samplers) for each in group),
        manifest.golden.file,
        *([] if manifest.calibration is None else [manifest.calibration]),
    }
    for name in sorted(named - manifest.files.keys()):
        raise malformed(f"{FILE_NAME}.files", f"no entry for {name!r}, which the manifest uses")
    keys = [plan.key for plan in manifest.plans]
    if len(set(keys)) != len(keys):
        raise malformed(f"{FILE_NAME}.plans", "two plans of one key")
    if manifest.golden.plan not in keys:
        raise malformed(f"{FILE_NAME}.golden", f"the plan {manifest.golden.plan!r}, which is not among plans")
    for sampler in manifest.samplers:
        if sampler.plan not in keys:
            raise malformed(f"{FILE_NAME}.samplers", f"the plan {sampler.plan!r}, which is not among plans")
    if "step" not in manifest.graphs:
        raise malformed(f"{FILE_NAME}.graphs", "no step network")
