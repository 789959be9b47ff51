"""Choosing, checking and launching compiled step kernels, above a driver that only records."""

from dataclasses import replace

import pytest
from faults import modules_after
from step_binaries import CUBIN, RecordingDriver, step_facts

from skipstep.edge.launcher import DeviceBuffer, StepLauncher, StepOperands
from skipstep.errors import InputError, ModelFormatError
from skipstep.kernels.layout import StepFlags

NUM_ELEMENTS, BATCH_SIZE, STAGE = 1040, 3, 5
IMAGE = 4 * BATCH_SIZE * NUM_ELEMENTS
EVERYTHING = StepFlags(
    threshold=True,
    read_h1=True,
    write_h2=True,
    add_noise=True,
    learned_variance=True,
    wide_output=True,
    guided=True,
    rescale=True,
)
# Bytes of every operand when EVERYTHING is on, the network in float16.
SIZES = {
    "state": IMAGE,
    "model_output": 2 * IMAGE,
    "network_input": IMAGE,
    "table": (STAGE + 1) * 128,
    "seeds": 8 * BATCH_SIZE,
    "guidance": 4 * BATCH_SIZE,
    "rescale": 4 * BATCH_SIZE,
    "bound": 4 * BATCH_SIZE,
    "history": 3 * IMAGE,
}
OPERANDS = {name: DeviceBuffer(0x7000_0000_0000 + 0x10000 * i, size) for i, (name, size) in enumerate(SIZES.items())}
CALL = {"batch_size": BATCH_SIZE, "stage": STAGE, "stream": 0x5EA}


def launcher(*facts, driver=None, num_elements=NUM_ELEMENTS, network_dtype="float16", **device):
    driver = driver or RecordingDriver(**device)
    binaries = [(each, CUBIN + each.target.encode()) for each in facts]
    return StepLauncher(binaries, num_elements=num_elements, network_dtype=network_dtype, driver=driver)


def plain_operands(**changes):
    needed = {name: OPERANDS[name] for name in ("state", "model_output", "network_input", "table")}
    return StepOperands(**{**needed, **changes})


@pytest.mark.parametrize("shuffled", [False, True])
def test_arguments_are_passed_in_the_order_that_the_facts_state(shuffled):
    facts = step_facts(flags=EVERYTHING)
    if shuffled:
        facts = replace(facts, arguments=facts.arguments[::-1])
    driver = RecordingDriver(sizes=[argument.num_bytes for argument in facts.arguments])
    launcher(facts, driver=driver).launch(EVERYTHING, StepOperands(**OPERANDS), **CALL)

    expected = {f"{name}_ptr": buffer.address for name, buffer in OPERANDS.items()}
    expected |= {"next_ptr": expected["state_ptr"], "output_ptr": expected.pop("model_output_ptr")}
    expected |= dict.fromkeys(("x0_ptr", "counter_ptr", "broken_ptr"), expected["state_ptr"])
    expected |= {"num_elements": NUM_ELEMENTS, "stage": STAGE, "global_scratch": 0, "profile_scratch": 0}
    [launch] = driver.launches
    assert launch == {
        "kernel": 0,
        "arguments": [expected[argument.name] for argument in facts.arguments],
        "grid": (2, BATCH_SIZE, 1),
        "threads": 128,
        "shared_bytes": 4096,
        "stream": 0x5EA,
    }


def test_statistics_are_kernels_of_their_own():
    one = launcher(step_facts(flags=EVERYTHING))
    assert one.missing([EVERYTHING]) == "statistics+threshold+wide_output+guided+rescale"
    with pytest.raises(InputError, match=r"got statistics\+threshold"):
        one.launch(EVERYTHING, StepOperands(**OPERANDS), **CALL, quantile=(7, 0.5, 1.5))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("damage", ["short", "misaligned", "null", "absent"])
def test_every_operand_that_is_used_is_checked(name, damage):
    driver = RecordingDriver()
    one = launcher(step_facts(flags=EVERYTHING), driver=driver)
    good = OPERANDS[name]
    bad = {
        "short": DeviceBuffer(good.address, good.num_bytes - 1),
        "misaligned": DeviceBuffer(good.address + 8, good.num_bytes),
        "null": DeviceBuffer(0, good.num_bytes),
        "absent": None,
    }[damage]
    with pytest.raises(InputError, match=name):
        one.launch(EVERYTHING, StepOperands(**{**OPERANDS, name: bad}), **CALL)
    assert not driver.launches


def test_operands_that_are_not_used_may_be_absent():
    driver = RecordingDriver(sizes=[argument.num_bytes for argument in step_facts().arguments])
    one = launcher(step_facts(), driver=driver)
    one.launch(StepFlags(), plain_operands(), batch_size=BATCH_SIZE, stage=STAGE, stream=0)
    assert 0 not in driver.launches[0]["arguments"][:12]


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 0}, {"batch_size": 65536}, {"stage": -1}, {"stage": 2**31}, {"stream": -1}, {"stage": 1.0}],
)
def test_numbers_out_of_range_are_refused(change):
    driver = RecordingDriver()
    with pytest.raises(InputError, match=next(iter(change))):
        launcher(step_facts(), driver=driver).launch(
            StepFlags(), plain_operands(), **{"batch_size": 1, "stage": 0, "stream": 0, **change}
        )
    assert not driver.launches


def test_a_stage_past_the_table_is_refused():
    table = DeviceBuffer(OPERANDS["table"].address, 10 * 128)
    driver = RecordingDriver(sizes=[argument.num_bytes for argument in step_facts().arguments])
    one = launcher(step_facts(), driver=driver)
    one.launch(StepFlags(), plain_operands(table=table), batch_size=BATCH_SIZE, stage=9, stream=0)
    with pytest.raises(InputError, match="table"):
        one.launch(StepFlags(), plain_operands(table=table), batch_size=BATCH_SIZE, stage=10, stream=0)


def test_a_variant_that_was_not_exported_is_named_beside_those_that_were():
    one = launcher(step_facts(), step_facts(flags=StepFlags(clip=True, add_noise=True)))
    with pytest.raises(InputError, match=r"got clip; expected one of plain; clip\+add_noise"):
        one.launch(StepFlags(clip=True), plain_operands(), batch_size=1, stage=0, stream=0)


@pytest.mark.parametrize(
    ("targets", "device", "chosen"),
    [
        (["sm_86", "sm_87", "sm_89"], 87, "sm_87"),
        (["sm_80", "sm_86"], 89, "sm_86"),
        (["sm_86", "sm_80"], 89, "sm_86"),
        (["sm_80", "sm_89"], 86, "sm_80"),
    ],
)
def test_the_nearest_architecture_is_loaded_and_no_other(targets, device, chosen):
    driver = RecordingDriver(device=device)
    one = launcher(*(step_facts(int(target[3:])) for target in targets), driver=driver)
    assert [facts.target for facts in one.facts] == [chosen]
    assert driver.loaded == [(CUBIN + chosen.encode(), "ddim_step_kernel")]


def test_wide_accesses_only_where_every_sample_is_aligned():
    both = step_facts(num_elements_multiple=1), step_facts(num_elements_multiple=16)
    assert [f.num_elements_multiple for f in launcher(*both, num_elements=784).facts] == [16]
    assert [f.num_elements_multiple for f in launcher(*both, num_elements=2700).facts] == [1]
    with pytest.raises(
        InputError, match="2700 elements per sample; expected one of float16, elements a multiple of 16"
    ):
        launcher(both[1], num_elements=2700)


def test_another_network_dtype_is_refused():
    with pytest.raises(InputError, match="bfloat16 network"):
        launcher(step_facts(), network_dtype="bfloat16")
    with pytest.raises(InputError, match="float16, bfloat16, float32"):
        launcher(step_facts(), network_dtype="fp16")


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b".version 8.8\n.target sm_87\n" * 4, CUBIN[:18] + b"\x3e\0"])
def test_only_cubins_reach_the_driver(content):
    driver = RecordingDriver()
    with pytest.raises(ModelFormatError, match="cubin"):
        StepLauncher([(step_facts(), content)], num_elements=784, network_dtype="float16", driver=driver)
    assert not driver.loaded


def test_leaving_the_context_closes_the_driver():
    driver = RecordingDriver()
    with launcher(step_facts(), driver=driver):
        assert not driver.closed
    assert driver.closed


def test_neither_torch_nor_triton_is_imported():
    loaded = modules_after("import skipstep.edge.launcher")
    assert "skipstep.edge.launcher" in loaded
    assert not loaded & {"torch", "triton", "numpy", "cuda"}
