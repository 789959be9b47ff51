from __future__ import annotations

from faults import modules_after


def test_building_on_a_device_takes_no_torch():
    """A Jetson has the bundle, onnx and TensorRT; what exported the network is elsewhere."""
    loaded = modules_after("import skipstep.export.engines, skipstep.commands.build")
    assert "skipstep.export.tensorrt_engine" in loaded
    assert not loaded & {"torch", "onnxscript", "onnxruntime", "triton", "diffusers"}
