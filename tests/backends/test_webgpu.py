"""The WebGPU backend on a Vulkan driver that computes on the CPU: SwiftShader, as Debian's chromium brings it along."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tolerances import WEBGPU_LOOP

from skipstep.backends.prefetch import Shared
from skipstep.backends.registry import resolve_backend
from skipstep.errors import ExportError, InputError, MissingDependencyError

CHROMIUM = Path("/usr/lib/chromium")
DRIVER, LOADER = CHROMIUM / "vk_swiftshader_icd.json", CHROMIUM / "libvulkan.so.1"
needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_ep_webgpu") is None, reason="no package onnxruntime-ep-webgpu"
)
needs_driver = pytest.mark.skipif(not (DRIVER.exists() and LOADER.exists()), reason="no chromium with SwiftShader")

ENGINES = """
import numpy as np, skipstep
from skipstep.demo import SHIPPED_BUNDLE
def load(backend):
    return skipstep.load(SHIPPED_BUNDLE, allow_hard_links=True, backend=backend)
"""
# Each plan of the bundle once; those that were fitted at the guidance scale that they were fitted for.
PLANS = f"""{ENGINES}
with load("onnxruntime") as expected, load("webgpu") as found:
    assert found.backend == "webgpu" and "nodes" not in found.describe()
    print(found.identity().library)
    for plan in found.plans.values():
        call = dict(plan=plan, seeds=3, class_labels=7, guidance_scale=2.0 if plan.solver == "fitted" else 1.0)
        images = found.sample(**call)
        print("error", plan.steps, np.abs(images - expected.sample(**call)).max())
    print(next(line for line in found.describe().splitlines() if line.startswith("nodes")))
"""
# Two engines and two threads at once on the device that they share; a request of another size.
THREADS = f"""{ENGINES}
from concurrent.futures import ThreadPoolExecutor
call = dict(steps=4, class_labels=2, guidance_scale=2.0)
with load("onnxruntime") as expected, load("webgpu") as one, load("webgpu") as two, ThreadPoolExecutor(2) as pool:
    futures = [pool.submit(engine.sample, seeds=seed, **call) for engine, seed in ((one, 1), (two, 2))]
    for seed, future in enumerate(futures, 1):
        print("error", seed, np.abs(future.result() - expected.sample(seeds=seed, **call)).max())
"""


def run(tmp_path: Path, code: str, *, driver: bool = True, software: bool = True) -> subprocess.CompletedProcess[str]:
    """`code` in a process whose only Vulkan driver is SwiftShader, or has none."""
    folder = tmp_path / "vulkan"
    folder.mkdir()
    environment = {
        **os.environ,
        "XDG_RUNTIME_DIR": str(tmp_path),
        "LD_LIBRARY_PATH": str(folder),
        "VK_ICD_FILENAMES": str(DRIVER if driver else tmp_path / "none.json"),
        "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER": str(int(software)),
    }
    if driver:  # The loader alone: chromium's folder holds other libraries, too.
        (folder / LOADER.name).symlink_to(LOADER)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def errors(told: subprocess.CompletedProcess[str]) -> list[float]:
    assert told.returncode == 0, told.stderr
    return [float(line.split()[-1]) for line in told.stdout.splitlines() if line.startswith("error")]


@needs_plugin
@needs_driver
@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_shipped_plan_draws_what_the_cpu_draws(tmp_path):
    told = run(tmp_path, PLANS)
    found = errors(told)
    print(told.stdout)
    assert len(found) == 6
    # Another device computed it: not one bit differing would be the CPU's own work.
    assert 0 < max(found) <= WEBGPU_LOOP
    assert told.stdout.startswith("ONNX Runtime 1.")
    nodes = told.stdout.splitlines()[-1].split()
    assert nodes[:1] + nodes[4:] == ["nodes", "nodes", "on", "WebGPU"]
    assert int(nodes[1]) == int(nodes[3]) > 300


@needs_plugin
@needs_driver
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_engines_and_threads_share_the_device(tmp_path):
    assert max(errors(run(tmp_path, THREADS))) <= WEBGPU_LOOP


@needs_plugin
@pytest.mark.parametrize("software", [False, True])
def test_a_machine_without_a_gpu_or_its_driver_is_told(tmp_path, software):
    told = run(tmp_path, f"{ENGINES}\nload('webgpu')", driver=False, software=software)
    assert told.returncode != 0
    last = told.stderr[told.stderr.rindex("DeviceUnavailableError") :]
    expected = r"no adapter: .*adapter" if software else r"no (GPU that the provider finds|adapter)"
    assert re.match(rf"DeviceUnavailableError: got WebGPU with {expected}", last, re.DOTALL), told.stderr
    assert "pass backend='onnxruntime'" in last


def test_it_is_the_cpu_loops_and_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "openvino") else name)
    assert resolve_backend("auto", device="cpu", exports=False).name == "onnxruntime"
    assert resolve_backend("webgpu", device="cpu", exports=False).module == "skipstep.backends.webgpu"
    with pytest.raises(InputError, match=r"backend='webgpu' on cuda.*pass device='cpu'"):
        resolve_backend("webgpu", device="cuda", exports=False)
    with pytest.raises(InputError, match=r"precision='float16' on the CPU with backend='webgpu'"):
        resolve_backend("webgpu", device="cpu", exports=False, precision="float16")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "webgpu" in name else name)
    with pytest.raises(MissingDependencyError, match=r"no package onnxruntime_ep_webgpu.*'skipstep\[webgpu\]'"):
        resolve_backend("webgpu", device="cpu", exports=False)


class Session:
    """What ONNX Runtime tells of its nodes."""

    def __init__(self, *parts: tuple[str, int]) -> None:
        self.parts = [SimpleNamespace(ep_name=name, get_nodes=lambda n=n: [None] * n) for name, n in parts]

    def get_provider_graph_assignment_info(self):
        return self.parts


def test_nodes_are_counted_and_a_graph_that_would_run_on_the_cpu_alone_is_refused():
    webgpu = importlib.import_module("skipstep.backends.webgpu")
    parts = [(webgpu.PROVIDER, 1), ("CPUExecutionProvider", 1), (webgpu.PROVIDER, 3)]
    assert webgpu.placement(Session(*parts)) == "4 of 5 nodes on WebGPU"
    with pytest.raises(ExportError, match="takes none of its nodes"):
        webgpu.placement(Session(("CPUExecutionProvider", 5)))


class Thing:
    def __init__(self, key: int) -> None:
        self.key = key


def test_what_is_shared_is_made_again_once_it_was_released():
    made = []
    shared = Shared(lambda key: made.append(key) or Thing(key))
    one = shared.get(2)
    assert shared.get(2) is one
    del one
    assert [shared.get(2).key, shared.get(3).key] == [2, 3]
    assert made == [2, 2, 3]
