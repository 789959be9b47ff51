"""Adding to a bundle: every file is verified on its way into a new folder, which takes the old one's place.

If the writer is killed at any moment, the old bundle stays. A signature is left out, because it belongs to the old
manifest: sign the bundle again.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from skipstep.bundles.bundle import Bundle, open_bundle
from skipstep.bundles.manifest import FILE_NAME, Manifest
from skipstep.errors import BundleError
from skipstep.export.bundle_files import BundleFiles
from skipstep.latency.calibration import FILE_NAME as CALIBRATION_NAME
from skipstep.latency.calibration import Calibration, matching, read_calibrations, write_calibrations
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
    bundle = open_bundle(path, require_signature=require_signature)
    manifest = bundle.manifest
    if manifest.digest != digest:
        raise BundleError(
            got=f"{path} with the network {manifest.digest[:12]}",
            expected=f"{digest[:12]}, which was measured",
            remedy="calibrate the bundle again: it was replaced meanwhile",
        )
    name = manifest.calibration or CALIBRATION_NAME
    held = read_calibrations(bundle.read(name)) if manifest.calibration is not None else ()
    earlier = matching(held, calibration.identity)
    whole = (earlier.updated_by(calibration) if earlier else calibration).only(plan.key for plan in manifest.plans)
    others = [each for each in held if each.identity != calibration.identity]
    changed = dataclasses.replace(manifest, calibration=name)
    rewrite_bundle(bundle, changed, {name: write_calibrations([*others, whole])})
    return whole
