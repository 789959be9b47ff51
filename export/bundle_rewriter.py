"""Adding to a bundle: every file is verified on its way into a new folder, which takes the old one's place.

Killed at any moment, the writer leaves the old bundle. A signature is of the manifest as it was, so it does not come
along: sign the bundle again.
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
    """Put `added` beside or in place of the bundle's files, under the manifest `changed`, whose files are noted here.

    Raises IntegrityError for a file that is not what it was, StorageError.
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
    """Keep what was measured of a bundle's engine in the bundle; what it then holds of this device.

    What was measured on other devices stays, and of this one what was not measured anew. `digest` is that of the
    manifest whose engine was measured. Raises BundleError where another network has taken its place since, or with what
    is there unreadable; IntegrityError, SignatureError, StorageError.
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
