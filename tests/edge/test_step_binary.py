"""What a kernel's facts may say, and that nothing else passes for them."""

import json

import pytest
from edge_bundles import kernel_facts
from hostile_json import FUZZ, JSON, fuzz
from hypothesis import given
from hypothesis import strategies as st
from step_binaries import step_facts

from skipstep.edge.step_binary import StepBinaryFacts
from skipstep.errors import BundleError, ModelFormatError
from skipstep.kernels.layout import StepFlags


@pytest.mark.parametrize(
    "facts",
    [
        step_facts(),
        step_facts(90, target="sm_90a", network_dtype="bfloat16", toolkit="13.4", num_elements_multiple=1),
        step_facts(flags=StepFlags(clip=True, add_noise=True, guided=True)),
    ],
)
def test_json_gives_back_the_facts(facts):
    assert StepBinaryFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts


def test_older_bundles_name_forms_that_they_do_not_have():
    value = step_facts().to_json()
    assert StepBinaryFacts.from_json(value | {"per_sample": False, "store_x0": False}) == step_facts()
    with pytest.raises(BundleError, match="per_sample"):
        StepBinaryFacts.from_json(value | {"per_sample": True})


def test_a_noise_kernel_has_arguments_of_its_own():
    step, once, twice = kernel_facts([StepFlags()], guided=True, num_elements=784)
    for facts in (once, twice):
        assert StepBinaryFacts.from_json(json.loads(json.dumps(facts.to_json()))) == facts
    # Step kernels are described as they were before there were others.
    assert "purpose" not in step.to_json()
    for change in (
        {"purpose": "step"},
        {"grid": ["1", "batch_size", "1"]},
        {"grid": []},
        {"purpose": "dream"},
        {"arguments": step.to_json()["arguments"]},
    ):
        with pytest.raises((BundleError, ModelFormatError)):
            StepBinaryFacts.from_json({**once.to_json(), **change})


def test_the_grid_covers_every_element():
    facts = step_facts(block_size=1024)
    assert facts.grid(784, 3) == (1, 3, 1)
    assert facts.grid(1024, 1) == (1, 1, 1)
    assert facts.grid(1025, 2) == (2, 2, 1)
    assert facts.threads_per_block == 128


@pytest.mark.parametrize(
    ("target", "capability", "runs"),
    [
        ("sm_87", 87, True),
        ("sm_90a", 90, True),
        ("sm_80", 86, True),
        ("sm_80", 89, True),
        ("sm_89", 86, False),  # binaries run on later minor versions, not on earlier ones
        ("sm_80", 90, False),
        ("sm_75", 80, False),
        ("sm_86", 87, False),  # between discrete and integrated GPUs there is no compatibility
        ("sm_87", 89, False),
        ("sm_120a", 121, False),  # with a suffix a cubin is for its own architecture
        ("sm_100a", 103, False),
        ("sm_100", 120, False),
    ],
)
def test_where_a_cubin_runs(target, capability, runs):
    architecture = int(target.removeprefix("sm_").removesuffix("a"))
    assert step_facts(architecture, target=target).runs_on(capability) is runs


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": True},
        {"architecture": 89},  # the target is sm_87
        {"target": "sm_87; rm"},
        {"kernel": "not a symbol"},
        {"kernel": "ddim_step_kernel\n"},
        {"flags": ["clip", "clip"]},
        {"flags": ["teleport"]},
        {"flags": [["clip"]]},
        {"flags": {"clip": True}},
        {"network_dtype": "float64"},
        {"block_size": 0},
        {"num_warps": 33},
        {"dynamic_shared_bytes": -1},
        {"dynamic_shared_bytes": 64 * 1024},
        {"registers": 256},
        {"pointer_alignment": 8},
        {"num_elements_multiple": 4},
        {"arguments": []},
        {"arguments": [["state_ptr"]]},
        {"arguments": "state_ptr"},
        {"toolkit": "twelve"},
        {"grid": ["num_elements", "1", "1"]},
    ],
    ids=lambda change: "{}={}".format(*next(iter(change.items()))),
)
def test_malformed_facts_are_refused(change):
    with pytest.raises(BundleError):
        StepBinaryFacts.from_json(step_facts().to_json() | change)


def test_missing_keys_and_other_values_are_refused():
    value = step_facts().to_json()
    for key in value:
        with pytest.raises(BundleError, match=key):
            StepBinaryFacts.from_json({k: v for k, v in value.items() if k != key})
    for other in (None, [], "facts", 3, {}):
        with pytest.raises(BundleError):
            StepBinaryFacts.from_json(other)


@pytest.mark.parametrize("damage", ["missing", "twice", "retyped", "unknown"])
def test_arguments_must_be_the_kernels(damage):
    """A launcher that does not know an argument would pass null, or leave the next one shifted."""
    value = step_facts().to_json()
    arguments = value["arguments"]
    if damage == "missing":
        del arguments[3]
    elif damage == "twice":
        arguments[3] = arguments[2]
    elif damage == "retyped":
        arguments[arguments.index(["num_elements", "int32"])] = ["num_elements", "*int64"]
    else:
        arguments.append(["more_scratch", "*int8"])
    with pytest.raises(BundleError, match="arguments"):
        StepBinaryFacts.from_json(value)


@fuzz(FUZZ // 5)
@given(key=st.sampled_from(sorted(step_facts().to_json())), value=JSON)
def test_any_json_is_read_or_refused_with_a_typed_error(key, value):
    damaged = step_facts().to_json() | {key: value}
    try:
        facts = StepBinaryFacts.from_json(damaged)
    except BundleError:
        return
    assert facts.to_json() == damaged
