"""Hooks of the benchmark, registered by skipstep.bench.plugin when the benchmark is what runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from skipstep.errors import SkipstepError, needs_packages

if TYPE_CHECKING:
    from skipstep.bench.options import Options
    from skipstep.bench.session import BenchSession


_SESSION: pytest.StashKey[BenchSession] = pytest.StashKey()


def options_of(config: pytest.Config) -> Options:
    """The command's options, checked. Raises InputError, and MissingDependencyError with the extras to install."""
    with needs_packages("torch, diffusers and the ONNX exporter", remedy="pip install 'skipstep[bench]'"):
        from skipstep.bench.options import Options
    get = config.getoption
    return Options(
        models=tuple(get("--model") or ("fashion-mnist",)),
        steps=get("--plans"),
        batch_sizes=get("--batch"),
        contenders=get("--contenders"),
        budget_seconds=get("--budget"),
        max_rounds=get("--rounds"),
        measure=get("--measure"),
        device=get("--device"),
        dtype=get("--dtype"),
        threads=get("--threads"),
        compile_seconds=get("--compile-budget"),
        paired=not get("--unpaired"),
        simulated=get("--simulated"),
    )


def pytest_configure(config: pytest.Config) -> None:
    """Bad options end the run before anything is collected."""
    config.addinivalue_line("markers", "timeout(seconds): limit of pytest-timeout, where that is installed")
    if not config.pluginmanager.has_plugin("benchmark"):
        raise pytest.UsageError("the benchmark needs pytest-benchmark: pip install 'skipstep[bench]'")
    try:
        options = options_of(config)
        from skipstep.bench.session import BenchSession

        session = config.stash[_SESSION] = BenchSession(options)
        if resumed := config.getoption("--resume"):
            from skipstep.bench.record import run_facts
            from skipstep.bench.resume import KeptResults

            session.resume(KeptResults(Path(resumed), {**run_facts(), **session.facts()}))
    except SkipstepError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "contender"} <= set(metafunc.fixturenames):
        session = metafunc.config.stash[_SESSION]
        cases = session.case_keys()
        # Smallest first: each case tells how long the next will take.
        ids = [f"{case.model}-{case.steps}-{case.batch_size}" for case in cases]
        metafunc.parametrize("case", cases, ids=ids)
        metafunc.parametrize("contender", [each.name for each in session.contenders])


@pytest.fixture(scope="session")
def bench_session(request: pytest.FixtureRequest) -> Iterator[BenchSession]:
    """What is shared by all cases: opened models, built contenders and reference samples."""
    session = request.config.stash[_SESSION]
    with session:
        yield session


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    from skipstep.latency.table import format_table

    if rows := config.stash[_SESSION].rows:
        terminalreporter.section("speed beside the textbook loop")
        terminalreporter.write_line(format_table(["case", "contender", "median ms", "× textbook", "error"], rows))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    from skipstep.bench.record import run_facts

    session = config.stash[_SESSION]
    facts = {**run_facts(simulated=bool(session.options.simulated)), **session.facts()}
    if session.kept is not None:
        digests = facts["digests"]
        kept = [
            each
            for (case, name), each in session.kept.benchmarks.items()
            if case.model not in digests or session.kept.holds(case, name, digests[case.model])
        ]
        output_json["benchmarks"] = [*kept, *output_json["benchmarks"]]
        facts["digests"] = {**session.kept.digests, **digests}
    output_json["skipstep"] = facts


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    # The machine's host name does not belong in a result.
    machine_info.pop("node", None)
