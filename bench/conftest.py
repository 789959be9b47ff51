"""Options of the pytest-benchmark suite: `pytest bench --model my-checkpoint --plans 10,20,50 --batch 1,8`.

Each case is measured once, all contenders taking turns; each contender's test then hands its times to pytest-benchmark,
so that one table compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skipstep.bench.contenders import contenders_named
from skipstep.bench.measure import Bench, Options
from skipstep.bench.models import subject_name
from skipstep.bench.record import environment
from skipstep.bench.results import Run, write_run
from skipstep.commands.bench import names, numbers
from skipstep.errors import SkipstepError


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("skipstep")
    group.addoption("--model", action="append", help="diffusers folder, bundle or name; may be repeated")
    group.addoption("--plans", type=numbers, default=(1, 10), help="step counts (default: 1,10)")
    group.addoption("--batch", type=numbers, default=(1,), help="batch sizes (default: 1)")
    group.addoption("--contenders", type=names, help="in order of importance (default: all)")
    group.addoption("--budget", type=float, default=30.0, help="seconds for a case (default: 30)")
    group.addoption("--threads", type=int, default=0, help="of every contender")
    group.addoption("--compile-budget", type=float, default=180.0, help="seconds for torch.compile (default: 180)")
    group.addoption("--results", type=Path, help="also write the run as skipstep's own JSON")


def _options(config: pytest.Config) -> Options:
    contenders = config.getoption("--contenders")
    return Options(
        models=tuple(config.getoption("--model") or ("fashion-mnist",)),
        steps=config.getoption("--plans"),
        batch_sizes=config.getoption("--batch"),
        budget_seconds=config.getoption("--budget"),
        threads=config.getoption("--threads"),
        compile_seconds=config.getoption("--compile-budget"),
        contenders=contenders or (),
    )


def pytest_configure(config: pytest.Config) -> None:
    """Bad options end the run before anything is collected."""
    try:
        for model in _options(config).models:
            subject_name(model)
    except SkipstepError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    options = _options(metafunc.config)
    models = [subject_name(model) for model in options.models]
    cases = [(m, s, b) for m in models for b in options.batch_sizes for s in options.steps]
    contenders = [kind.name for kind in contenders_named(options.contenders)]
    metafunc.parametrize("case_key", cases, ids=[f"{m}-{s} steps-batch {b}" for m, s, b in cases], scope="session")
    metafunc.parametrize("contender", contenders)


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """The run, measured case by case as tests ask; written to --results at the end."""
    options = _options(request.config)
    with Bench(options) as bench:
        yield bench
        results = request.config.getoption("--results")
        if results is not None:
            given = {**options.as_json(), "digests": bench.digests}
            write_run(results, Run(environment(), given, tuple(bench.cases.values())))


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    # The name of the machine is nobody's business.
    machine_info.pop("node", None)
