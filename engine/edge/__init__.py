"""The step kernels as machine code and how to launch them, without torch and Triton."""
