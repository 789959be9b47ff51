"""What runs a network on one kind of device, each behind the denoiser protocol. ADD A BACKEND in registry.py.

May import calls, networks and cuda; loops, the engine and everything above may import it.

denoiser     the protocol, and what a backend is given: a network source and a target
registry     the table of backends
early        what of a network is computed before the loop, whatever computes it
onnxruntime  the CPU's default;  openvino, openvino_library  the CPU in float32 and bfloat16
webgpu       any vendor's GPU from the CPU's loop
prefetch     what is loaded in the background;  processor  what compiled code depends on
torch        the reference, on the CPU;  torch_cuda  on a GPU
torch_split  a module as a step on the GPU and earlier parts on the host;  torch_graph, torch_rules  how it gets there
device_step  what step networks on a GPU share;  onnxruntime_cuda, tensorrt  those that were compiled elsewhere
"""
