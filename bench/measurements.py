"""What is no case: fits, build times, throughput, cold start and peak memory. And the whole run.

Each measurement goes by its name into `Run.measurements`, as JSON. One that fails is recorded with the reason.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from skipstep import Engine
from skipstep.bench import cold_start
from skipstep.bench.contenders.engines import ONNX, build_engine
from skipstep.bench.contenders.workload import Workload
from skipstep.bench.fits import fits_as_json
from skipstep.bench.journal import Journal, journal_path
from skipstep.bench.measure import Bench, Options
from skipstep.bench.models import Subject
from skipstep.bench.peak_memory import NEEDS_EXPORT, peak_memory
from skipstep.bench.record import environment
from skipstep.bench.results import Case, Run, write_run
from skipstep.bench.throughput import throughput_as_json
from skipstep.bench.timing import median_ratio
from skipstep.errors import InputError
from skipstep.export.onnx_model import export_onnx
from skipstep.export.partition import partition

_COLD_START_ROUNDS = 7


def build_seconds(bench: Bench) -> list[dict[str, Any]]:
    """From a checkpoint to an engine and to a bundle, step by step, with nothing from a cache."""
    found = []
    for subject in _folders(bench):
        module, spec = subject.prepared
        started = time.perf_counter()
        exported = export_onnx(module, spec)
        written = time.perf_counter()
        partition(exported)
        divided = time.perf_counter()
        # The network comes from the cache now, so this is what is left: loop, sessions, and a check against torch.
        subject.exported  # noqa: B018
        begun = time.perf_counter()
        engine = _small_engine(bench, subject)
        built = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            _save(engine, Path(folder) / "bundle", subject)
            saved = time.perf_counter()
        found.append(
            {
                "model": subject.name,
                "export_seconds": written - started,
                "partition_seconds": divided - written,
                "engine_seconds": built - begun,
                "bundle_seconds": saved - built,
            }
        )
    return found


def throughput(bench: Bench) -> list[dict[str, Any]]:
    """Of the default engine, at the smallest batch size."""
    found = []
    for subject in bench.subjects.values():
        workload = _small_workload(bench, subject)
        draw = bench.built(ONNX, subject)[0].prepare(workload)
        found.append(
            {
                "model": subject.name,
                "contender": ONNX.name,
                "steps": workload.steps,
                "batch_size": workload.batch_size,
                "engine_threads": bench.options.threads,
                "callers": throughput_as_json(draw),
            }
        )
    return found


def cold_starts(bench: Bench) -> dict[str, Any]:
    """Of the shipped model (skipstep.bench.cold_start)."""
    seconds = cold_start.measure(_COLD_START_ROUNDS)
    return {
        "steps": 10,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "ratio_to_diffusers": median_ratio(seconds["diffusers"], seconds["bundle"]),
        "seconds": seconds,
    }


def peak_memories(bench: Bench) -> list[dict[str, Any]]:
    """Of each contender that has a number, at the smallest batch size."""
    found: list[dict[str, Any]] = []
    for subject in bench.subjects.values():
        workload = _small_workload(bench, subject)
        case = bench.cases.get((subject.name, workload.steps, workload.batch_size))
        with tempfile.TemporaryDirectory() as folder:
            bundle = subject.path if subject.is_bundle else Path(folder) / "bundle"
            if not subject.is_bundle:
                _save(_small_engine(bench, subject), bundle, subject)
            for contender in () if case is None else case.contenders:
                if contender.status != "ok":
                    continue
                row: dict[str, Any] = {"model": subject.name, "contender": contender.name, "peak_bytes": None}
                row |= {"steps": workload.steps, "batch_size": workload.batch_size}
                try:
                    if contender.name in NEEDS_EXPORT:
                        raise RuntimeError("its process would hold an exporter that no deployment holds")
                    row["peak_bytes"] = peak_memory(
                        str(bundle if contender.name == ONNX.name else subject.path),
                        contender.name,
                        steps=workload.steps,
                        batch_size=workload.batch_size,
                        threads=bench.options.threads,
                    )
                except RuntimeError as error:
                    row["reason"] = str(error)
                found.append(row)
    return found


MEASUREMENTS: dict[str, Callable[[Bench], Any]] = {
    "fits": lambda bench: fits_as_json(bench.cases.values()),
    "build": build_seconds,
    "throughput": throughput,
    "cold_start": cold_starts,
    "peak_memory": peak_memories,
}


def checked_measurements(names: Sequence[str]) -> tuple[str, ...]:
    """Raises InputError, which lists what there is."""
    unknown = [name for name in names if name not in MEASUREMENTS]
    if unknown:
        raise InputError(
            got=f"measurements {', '.join(unknown)}",
            expected=f"names among {', '.join(MEASUREMENTS)}",
            remedy="correct them, or pass --measure fits",
        )
    return tuple(name for name in MEASUREMENTS if name in names)


def measure_run(
    options: Options,
    *,
    measurements: Sequence[str] = ("fits",),
    out: Path | None = None,
    resume: bool = False,
    progress: Callable[[str], None] | None = None,
    command: str = "",
) -> Run:
    """Measure all cases, then what is no case, and write the run to `out`, whole or not at all.

    `command` is what measures the same again, for readers of the result.
    What has been measured is kept beside `out` after every case (skipstep.bench.journal), and `resume` goes on there.
    """
    names = checked_measurements(measurements)
    with Bench(options, progress=progress) as bench:
        journal = Journal(
            None if out is None else journal_path(out),
            environment=environment(),
            options={**options.as_json(), "measurements": names, "digests": bench.digests},
            resume=resume,
        )
        bench.keep_journal(journal)
        for key in bench.case_keys():
            bench.case(*key)
        for name in names:
            if name not in journal.measurements:
                bench.progress(f"measure {name}")
                journal.keep_measurement(name, _measured(name, bench))
        run = with_peak_memory(journal.run())
        run = replace(run, options={**run.options, "command": command} if command else run.options)
        if out is not None:
            write_run(out, run)
            journal.discard()
        return run


def with_peak_memory(run: Run) -> Run:
    """The run with its contenders' peak memory in the cases of the batch size at which that was measured."""
    rows = run.measurements.get("peak_memory")
    peaks = {
        (row["model"], row["batch_size"], row["contender"]): row["peak_bytes"]
        for row in (rows if isinstance(rows, list) else [])
    }

    def completed(case: Case) -> Case:
        contenders = tuple(
            replace(each, peak_memory_bytes=peaks.get((case.model, case.batch_size, each.name)))
            for each in case.contenders
        )
        return replace(case, contenders=contenders)

    return replace(run, cases=tuple(map(completed, run.cases)))


def _measured(name: str, bench: Bench) -> Any:
    try:
        return MEASUREMENTS[name](bench)
    except Exception as error:  # What was measured so far is worth more than this one.
        return {"failed": f"{type(error).__name__}: {error}"}


def _folders(bench: Bench) -> list[Subject]:
    return [subject for subject in bench.subjects.values() if not subject.is_bundle]


def _small_workload(bench: Bench, subject: Subject) -> Workload:
    """Ten steps where the run has them, else its fewest from there on; the smallest batch."""
    options = bench.options
    steps = min((s for s in options.steps if s >= 10), default=options.steps[-1])
    return Workload(subject, subject.plan(steps), options.batch_sizes[0])


def _small_engine(bench: Bench, subject: Subject) -> Engine:
    workload = _small_workload(bench, subject)
    setup = replace(bench.setup(subject), plans=(workload.plan,), batch_sizes=(workload.batch_size,), device="cpu")
    return build_engine(subject, setup, backend="onnxruntime", loop="onnx")


def _save(engine: Engine, path: Path, subject: Subject) -> None:
    engine.save(path, license="for measuring alone", name=subject.name)
