"""Whether a contender's samples are right: nothing else gets a number."""

from __future__ import annotations

import numpy as np

from skipstep.bench.contenders.workload import Contender, Samples, Workload


def largest_difference(drawn: Samples, reference: Samples, contender: Contender) -> float:
    """The largest difference over the reference's largest magnitude; inf for samples of another shape."""
    if drawn.shape != reference.shape:
        return float("inf")
    if contender.pictures:
        reference = reference.clip(-1.0, 1.0)
    return float(np.abs(drawn - reference).max() / np.abs(reference).max())


def golden_error(workload: Workload) -> tuple[float, float]:
    """How far a bundle's engine is off the samples that the bundle's builder drew, and how far it may be.

    Raises IntegrityError beyond that.
    """
    from skipstep import load
    from skipstep.bundles.bundle import open_bundle
    from skipstep.bundles.golden import replay_golden

    bundle = open_bundle(workload.subject.path, allow_hard_links=True)
    golden = bundle.manifest.golden
    if golden is None:
        raise ValueError("the bundle holds no golden samples to compare with")
    engine = load(workload.subject.path, allow_hard_links=True)
    return replay_golden(engine, golden, bundle.read_arrays(golden.file)), golden.tolerance


def described(error: Exception) -> str:
    first = str(error).strip().split("\n")[0][:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
