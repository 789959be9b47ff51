"""Adding to a bundle: every file is verified on its way into a new folder, which takes the old one's place.

If the writer is killed at any moment, the old bundle stays. A signature is left out, because it belongs to the old
manifest: sign the bundle again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from safetensors.numpy import save as save_arrays

from skipstep.bundles.bundle import Bundle, open_bundle
from skipstep.bundles.manifest import FILE_NAME, Manifest, PlanEntry
from skipstep.bundles.tables import plan_arrays, read_plans
from skipstep.calls.conditioning import distinct
from skipstep.errors import BundleError
from skipstep.export.bundle_files import BundleFiles
from skipstep.latency.calibration import FILE_NAME as CALIBRATION_NAME
from skipstep.latency.calibration import Calibration, matching, read_calibrations, write_calibrations
from skipstep.plans.plan import Plan
from skipstep.storage.atomic import atomic_folder


def rewrite_bundle(bundle: Bundle, changed: Manifest, added: Mapping[str, bytes]) -> None:
    """Add files to the bundle, or replace files, under the manifest `changed`; its file entries are filled in here.

    Raises IntegrityError for a file that has changed, StorageError.
    """
    with atomic_folder(bundle.path, replace=True) as folder:
        files = BundleFiles(folder)
        for name in bundle.manifest.files:
            if name not in added:
                files.add(name, bundle.read(name))
        for name, data in added.items():
            files.add(name, data)
        (folder / FILE_NAME).write_bytes(dataclasses.replace(changed, files=files.entries).to_json())


def add_calibration(
    path: str | os.PathLike[str],
    calibration: Calibration,
    *,
    digest: str,
    require_signature: str | os.PathLike[str] | None = None,
) -> Calibration:
    """Store measured latencies of a bundle's engine in the bundle; returns all that it then holds of this device.

    Latencies of other devices stay, and those of this device that were not measured again. `digest` is that of the
    manifest whose engine was measured. Raises BundleError if another network has taken its place since, or if the
    stored latencies cannot be read; IntegrityError, SignatureError, StorageError.
    """
    bundle = _same_network(path, digest, require_signature)
    manifest = bundle.manifest
    name = manifest.calibration or CALIBRATION_NAME
    held = read_calibrations(bundle.read(name)) if manifest.calibration is not None else ()
    earlier = matching(held, calibration.identity)
    whole = (earlier.updated_by(calibration) if earlier else calibration).only(plan.key for plan in manifest.plans)
    others = [each for each in held if each.identity != calibration.identity]
    changed = dataclasses.replace(manifest, calibration=name)
    rewrite_bundle(bundle, changed, {name: write_calibrations([*others, whole])})
    return whole


def add_plans(
    path: str | os.PathLike[str],
    plans: Sequence[Plan],
    *,
    digest: str,
    require_signature: str | os.PathLike[str] | None = None,
) -> list[Plan]:
    """Store plans of a bundle's own schedules in the bundle; returns those that it did not hold. Of a plan that it
    holds, a quality that was measured is stored.

    `digest` is that of the manifest whose network they are for. Raises as `add_calibration`, and BundleError for a plan
    of another schedule.
    """
    from skipstep.backends.onnxruntime import EarlyGraphs  # A device that only builds engines has no ONNX Runtime.

    bundle = _same_network(path, digest, require_signature)
    manifest, held = bundle.manifest, {plan.key for plan in bundle.manifest.plans}
    arrays = dict(bundle.read_arrays(manifest.tables))
    numbers = {
        plan.schedule: entry.schedule for plan, entry in zip(read_plans(manifest, arrays), manifest.plans, strict=True)
    }
    graphs = {
        part: bundle.read_graph(name) for part, name in manifest.graphs.items() if part in ("plan", "prompt", "call")
    }
    early = EarlyGraphs(graphs, manifest.network)
    new = [plan for plan in dict.fromkeys(plans) if plan.key not in held]
    for plan in new:
        if plan.schedule not in numbers:
            raise BundleError(
                got=f"{plan!r} of a schedule that {path} does not hold",
                expected="the schedule of one of its plans",
                remedy="export the model again with this plan",
            )
        stored = early.of_labels if manifest.kernels else early.tables_at
        arrays |= plan_arrays(plan, stored(distinct(plan.evaluation_timesteps)[0]))
    qualities = {plan.key: quality for plan in plans if (quality := plan.options().get("quality"))}

    def measured(entry: PlanEntry) -> PlanEntry:
        quality = qualities.get(entry.key)
        return entry if quality is None else dataclasses.replace(entry, options={**entry.options, "quality": quality})

    entries = [measured(entry) for entry in manifest.plans]
    entries += [PlanEntry(plan.key, numbers[plan.schedule], plan.options()) for plan in new]
    if tuple(entries) != manifest.plans:
        changed = dataclasses.replace(manifest, plans=tuple(entries))
        rewrite_bundle(bundle, changed, {manifest.tables: save_arrays(arrays)})
    return new


def _same_network(path: str | os.PathLike[str], digest: str, key: str | os.PathLike[str] | None) -> Bundle:
    bundle = open_bundle(path, require_signature=key)
    if bundle.manifest.digest != digest:
        raise BundleError(
            got=f"{path} with the network {bundle.manifest.digest[:12]}",
            expected=f"{digest[:12]}, which was measured",
            remedy="repeat the command: the bundle was replaced meanwhile",
        )
    return bundle
