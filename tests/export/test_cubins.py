"""Step kernels compiled ahead of time: real cubins, and facts that agree with what the compiler wrote."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton")

from step_binaries import RecordingDriver

from skipstep import NoiseSchedule, Plan
from skipstep.calls.request import resolve_request
from skipstep.edge.launcher import DeviceBuffer, StepLauncher, StepOperands
from skipstep.edge.step_binary import StepBinaryFacts
from skipstep.errors import InputError
from skipstep.export.cubins import ARCHITECTURES, compile_kernels, needed_variants, parse_architecture
from skipstep.kernels.layout import NUM_COLUMNS, StepFlags
from skipstep.loops.contract import call_flags
from skipstep.networks.spec import NetworkSpec
from skipstep.plans.stages import Stages

TARGETS = {75: "sm_75", 87: "sm_87", 89: "sm_89", 90: "sm_90a", 120: "sm_120a"}
NOISY = StepFlags(clip=True, add_noise=True)

# A process of its own, as pytest's has loaded the kernels for Triton's interpreter.
COMPILE = """
import itertools, json, sys
from pathlib import Path
from skipstep.export.cubins import compile_kernels, loop_kernels
from skipstep.kernels.layout import NUM_COLUMNS, StepFlags

def keep(architectures, variants, dtypes, purpose="step", num_elements=784):
    kernels = [each for each in loop_kernels(variants) if each[0] == purpose]
    for binary in compile_kernels(architectures, kernels, dtypes, num_elements=num_elements):
        stem = Path(sys.argv[1]) / str(next(numbers))
        stem.with_suffix(".cubin").write_bytes(binary.cubin)
        stem.with_suffix(".ptx").write_text(binary.ptx)
        stem.with_suffix(".json").write_text(json.dumps(binary.facts.to_json()))

numbers = itertools.count()
plain, noisy = StepFlags(), StepFlags(clip=True, add_noise=True)
keep([75, 87, 89, 90, 120], [plain, noisy], ["float16"])
keep([87], [plain], ["bfloat16"])
keep([87], [plain], ["float16"], num_elements=2700)
one_each = ["threshold", "read_h2", "write_h0", "add_noise", "guided", "rescale"]
keep([89], [plain, *(StepFlags(**{name: True}) for name in one_each)], ["float32"])
keep([86], [plain, noisy, StepFlags(guided=True)], ["float16"], "noise")
both = StepFlags(clip=True, threshold=True, rescale=True, guided=True)
keep([80], [plain, both, noisy], ["float16"], "statistics")
"""


class Compiled(NamedTuple):
    facts: StepBinaryFacts
    cubin: Path
    ptx: str

    @property
    def parameters(self) -> list[str]:
        """Types of the kernel's parameters, in order."""
        declaration = self.ptx[self.ptx.index(f".entry {self.facts.kernel}(") :].split(")")[0]
        return [line.split()[1] for line in declaration.splitlines() if line.strip().startswith(".param")]

    @property
    def used(self) -> set[str]:
        """Names of the arguments that the kernel reads."""
        indices = set(map(int, re.findall(r"ld\.param\.\w+\s[^;]*_param_(\d+)\]", self.ptx)))
        return {self.facts.arguments[index].name for index in indices}

    def dump(self, option: str) -> str:
        import triton

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        return subprocess.run([tool, option, self.cubin], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[Compiled]:
    folder = tmp_path_factory.mktemp("cubins")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE, str(folder)], check=True, env=environment)
    return [
        Compiled(
            StepBinaryFacts.from_json(json.loads(file.read_text())),
            file.with_suffix(".cubin"),
            file.with_suffix(".ptx").read_text(),
        )
        for file in sorted(folder.glob("*.json"), key=lambda file: int(file.stem))
    ]


def select(compiled: list[Compiled], **values: object) -> list[Compiled]:
    return [each for each in compiled if all(getattr(each.facts, key) == value for key, value in values.items())]


@pytest.mark.parametrize("architecture", TARGETS)
def test_a_cubin_is_an_elf_for_its_architecture(compiled, architecture):
    ours = select(compiled, architecture=architecture)
    assert {each.facts.flags for each in ours} >= {StepFlags(), NOISY}
    for each in ours:
        assert each.cubin.read_bytes()[:4] == b"\x7fELF"
        header = each.dump("-elf")
        assert f"sm={TARGETS[architecture].removeprefix('sm_')}," in header
        assert each.facts.target == TARGETS[architecture]
        assert each.facts.toolkit.replace(".", "") in header.replace(".", "")
        # The older assembler knows all of these, and what it makes runs on drivers for CUDA 12.
        assert each.facts.toolkit.startswith("12.")


def test_arguments_are_the_parameters_that_the_assembly_declares(compiled):
    types = {"int32": ".u32", "float32": ".f32"}
    for each in compiled:
        assert each.parameters == [types.get(argument.type, ".u64") for argument in each.facts.arguments]


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"flags": StepFlags(threshold=True)}, "bound_ptr"),
        ({"flags": StepFlags(read_h2=True)}, "history_ptr"),
        ({"flags": StepFlags(write_h0=True)}, "history_ptr"),
        ({"flags": StepFlags(add_noise=True)}, "seeds_ptr"),
        ({"flags": StepFlags(guided=True)}, "guidance_ptr"),
        ({"flags": StepFlags(rescale=True)}, "rescale_ptr"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_argument_is_read_where_its_flag_is_set_and_only_there(compiled, change, argument):
    """That every name stands at the right position: a flag brings in one parameter, found by its index in the PTX."""
    case = {"architecture": 89, "network_dtype": "float32", "flags": StepFlags()}
    [plain], [other] = select(compiled, **case), select(compiled, **{**case, **change})
    operands = {"state_ptr", "next_ptr", "output_ptr", "network_input_ptr", "table_ptr"}
    assert plain.used == operands | {"num_elements", "stage"}
    assert other.used == plain.used | {argument}


def test_a_launch_packs_what_the_assembly_declares(compiled):
    operands = {
        "state": DeviceBuffer(0x7000_0001_0000, 4 * 784),
        "model_output": DeviceBuffer(0x7000_0002_0000, 2 * 784),
        "network_input": DeviceBuffer(0x7000_0003_0000, 2 * 784),
        "table": DeviceBuffer(0x7000_0004_0000, 10 * 128),
        "seeds": DeviceBuffer(0x7000_0005_0000, 8),
    }
    for architecture in TARGETS:
        ours = select(compiled, architecture=architecture, network_dtype="float16", num_elements_multiple=16)
        sizes = [{".u64": 8, ".u32": 4}[kind] for kind in ours[0].parameters]
        driver = RecordingDriver(device=architecture, cuda=13, sizes=sizes)
        binaries = [(each.facts, each.cubin.read_bytes()) for each in ours]
        with StepLauncher(binaries, num_elements=784, network_dtype="float16", driver=driver) as launcher:
            launcher.launch(NOISY, StepOperands(**operands), batch_size=1, stage=9, stream=0)
        state, output, network_input, table, seeds = (buffer.address for buffer in operands.values())
        [launch] = driver.launches
        assert launch["arguments"] == [
            *(state, state, output, network_input),
            *(state, state),
            *(table, seeds),
            *(state, state, state, state, state),
            *(784, 9, 0, 0),
        ]


def test_launch_metadata_is_the_compilers(compiled):
    for each in compiled:
        assert int(re.search(r"\.reqntid\s+(\d+)", each.ptx)[1]) == each.facts.threads_per_block
        registers, static = re.search(r"REG:(\d+) .*SHARED:(\d+)", each.dump("-res-usage")).groups()
        assert (each.facts.registers, each.facts.static_shared_bytes) == (int(registers), int(static))
        # Float16 is exchanged between threads, float32 is not.
        assert (each.facts.dynamic_shared_bytes > 0) == (".extern .shared" in each.ptx)
        assert f" {each.facts.kernel}" in each.dump("-res-usage")


def test_the_noise_kernel_reads_seeds_and_whether_the_state_is_given(compiled):
    once, twice = select(compiled, purpose="noise")
    assert (once.facts.flags, twice.facts.flags) == (StepFlags(), StepFlags(guided=True))
    for each in (once, twice):
        # The stage of x_T is a word of its noise counter.
        assert each.used == {"state_ptr", "network_input_ptr", "seeds_ptr", "given_ptr", "num_elements", "stage"}
        assert each.facts.target == "sm_86"
    stores = [len(re.findall(r"st\.global", each.ptx)) for each in (once, twice)]
    assert stores[1] > stores[0] > 0


def test_statistics_are_compiled_once_for_the_steps_that_need_them(compiled):
    [each] = select(compiled, purpose="statistics")
    assert each.facts.flags == StepFlags(threshold=True, rescale=True, guided=True)
    assert each.used == {argument.name for argument in each.facts.arguments[:-2]}
    assert each.facts.grid(784, 3) == (1, 3, 1)
    assert re.search(r"STACK:0 .*LOCAL:0", each.dump("-res-usage")), "spills"
    assert "fma.rn" not in each.ptx


def test_samples_that_are_not_aligned_get_narrow_accesses(compiled):
    [narrow] = select(compiled, num_elements_multiple=1)
    [wide] = select(compiled, architecture=87, network_dtype="float16", flags=StepFlags(), num_elements_multiple=16)
    assert ".v4." in wide.ptx
    assert ".v4." not in narrow.ptx


def test_cubins_do_not_tell_where_they_were_compiled(compiled):
    for each in compiled:
        content = each.cubin.read_bytes()
        assert b"step_kernel.py" not in content
        assert b".debug_line" not in content


def test_kernels_of_the_interpreter_are_refused():
    code = "from skipstep.export.cubins import compile_kernels as c; from skipstep.kernels.layout import StepFlags\n"
    code += "c([87], [('step', StepFlags())], ['float16'], num_elements=784)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert "ExportError" in result.stderr
    assert "TRITON_INTERPRET" in result.stderr


def test_architectures_are_named_by_compute_capability():
    assert [parse_architecture(f"sm_{architecture}") for architecture in ARCHITECTURES] == list(ARCHITECTURES)
    assert {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ["sm_101", "sm_70", "87", "sm_90a", "SM_87", "", "rtx", "sm_87,sm_89"])
def test_other_architectures_are_refused_with_those_there_are(name):
    with pytest.raises(InputError, match=r"sm_75, .*sm_87, .*sm_121"):
        parse_architecture(name)


def test_what_cannot_be_compiled_is_refused_before_anything_is():
    with pytest.raises(InputError, match="sm_101"):
        compile_kernels([101], [("step", StepFlags())], ["float16"], num_elements=784)
    with pytest.raises(InputError, match="float8"):
        compile_kernels([87], [("step", StepFlags())], ["float8"], num_elements=784)


def test_variants_are_those_of_the_calls():
    clip, noisy = StepFlags(clip=True), StepFlags(clip=True, add_noise=True)
    stages = [noisy, noisy, clip, noisy]
    assert needed_variants(stages, guided=False, wide_output=False) == (noisy, clip)

    def call(flags: dict[str, bool]) -> tuple[StepFlags, StepFlags]:
        return StepFlags(clip=True, add_noise=True, **flags), StepFlags(clip=True, **flags)

    guided = needed_variants(stages, guided=True, wide_output=True)
    assert set(guided) == {*call({"wide_output": True}), *call({"wide_output": True, "guided": True})}
    rescaled = needed_variants(stages, guided=True, wide_output=False, rescale=True)
    assert set(rescaled) == {*call({}), *call({"guided": True}), *call({"guided": True, "rescale": True})}


def test_plans_need_the_variants_that_their_loop_runs():
    """Against skipstep.loops.contract.call_flags, which decides for every call."""
    schedule = NoiseSchedule.linear()
    plans = [Plan(schedule=schedule, steps=5), Plan(schedule=schedule, steps=5, eta=1.0)]
    network = NetworkSpec((1, 4, 4), num_classes=10, null_label=10)
    needed = set(
        needed_variants([f for plan in plans for f in plan.stage_flags], guided=True, wide_output=False, rescale=True)
    )
    run = set()
    for plan in plans:
        for options in ({}, {"guidance_scale": 2.0}, {"guidance_scale": 2.0, "guidance_rescale": 0.5}):
            request = resolve_request(network, seeds=[0], x_T=None, class_labels=[1], **options)
            run |= set(call_flags(network, Stages.of([plan]), request))
    assert run == needed


@pytest.mark.gpu
def test_a_launched_cubin_does_what_the_compiled_kernel_does():
    pytest.importorskip("cuda.bindings")
    import torch

    from skipstep.kernels.step import ddim_step

    major, minor = torch.cuda.get_device_capability()
    [binary] = compile_kernels([10 * major + minor], [("step", NOISY)], ["float16"], num_elements=784)
    torch.manual_seed(0)
    state = torch.randn(3, 1, 28, 28, device="cuda")
    tensors = {
        "model_output": torch.randn_like(state).half(),
        "table": torch.rand(4, 1, NUM_COLUMNS, device="cuda"),
        "seeds": torch.arange(3, device="cuda"),
    }
    expected, launched = (
        {"state": state.clone(), "network_input": torch.empty_like(state, dtype=torch.float16)} for _ in range(2)
    )
    ddim_step(**expected, **tensors, stage=2, flags=NOISY)
    buffers = {name: DeviceBuffer(t.data_ptr(), t.nbytes) for name, t in (launched | tensors).items()}
    stream = torch.cuda.current_stream().cuda_stream
    with StepLauncher([(binary.facts, binary.cubin)], num_elements=784, network_dtype="float16") as launcher:
        launcher.launch(NOISY, StepOperands(**buffers), batch_size=3, stage=2, stream=stream)
        torch.cuda.synchronize()
    for name, tensor in expected.items():
        assert torch.equal(launched[name], tensor), name
