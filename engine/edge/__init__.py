"""A loop on an NVIDIA GPU without torch and Triton: compiled kernels, TensorRT engines, and the CUDA driver.

step_binary   what must be known of a compiled kernel     network   the step network as an engine on the driver's memory
launcher      choosing, loading and launching kernels     program   memory, launches and graph of one structure
blocks        named arrays that travel in one copy        loop      the engine's loop (skipstep.loops.contract)

skipstep.edge_loading makes it of a bundle.
"""
