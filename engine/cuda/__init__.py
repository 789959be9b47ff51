"""The GPU: device, streams and graphs, through torch or through the driver.

Imports errors alone; backends, loops and everything above may import it. Names for others: Device, CudaDevice and
CAPTURE_LOCK (device, which needs torch), cuda_device and DeviceFacts (probe, which needs nothing), CudaDriver (driver,
cuda-bindings).
"""
