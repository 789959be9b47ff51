"""Devices that latencies in tests were measured on."""

from skipstep.latency.identity import DeviceIdentity

CPU = DeviceIdentity(
    device="cpu",
    name="a processor",
    backend="onnxruntime",
    library="onnxruntime 1.31.1",
    loop="stepwise",
    precision="float32",
    cores=4,
    threads=2,
)
GPU = DeviceIdentity(
    device="cuda",
    name="NVIDIA H200",
    backend="tensorrt",
    library="tensorrt 10.8",
    loop="captured",
    precision="float16",
    driver="580.65",
)
