from __future__ import annotations

from skipstep.bench import step_reference
from skipstep.bench.record import write_json


def test_a_step_moves_what_is_counted_and_the_table_shows_it(tmp_path):
    cases = [step_reference.measure(1 << 12, eta=eta, rounds=3) for eta in (0.0, 1.0)]
    for case in cases:
        assert case["moved_bytes"] == 4 << 12
        assert 0 < case["step_gb_per_s"] < case["copy_gb_per_s"]
    # Drawing noise is most of the work.
    assert cases[1]["step_gb_per_s"] < cases[0]["step_gb_per_s"]
    write_json(tmp_path / "step-reference.json", {"cases": cases})
    assert "| 4 KiB |" in step_reference.reference_table(tmp_path)
