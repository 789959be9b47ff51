"""What runs a network on one kind of device, each behind the denoiser protocol. ADD A BACKEND in registry.py.

May import calls, networks and cuda; loops, the engine and everything above may import it.

denoiser     the protocol, and what a backend is given: a network source and a target
registry     the table of backends
onnxruntime  the CPU's default; also what computes step inputs before any loop
torch        the reference, on the CPU;  torch_cuda  on a GPU
device_step  what compiled step networks on a GPU share;  onnxruntime_cuda, tensorrt  two of them
"""
