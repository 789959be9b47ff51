from __future__ import annotations

import subprocess
import sys


def test_building_on_a_device_takes_no_torch():
    """A Jetson has the bundle, onnx and TensorRT; what exported the network is elsewhere."""
    code = "import sys, skipstep.export.engines, skipstep.commands.build; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "skipstep.export.tensorrt_engine" in loaded
    assert not loaded & {"torch", "onnxscript", "onnxruntime", "triton", "diffusers"}
