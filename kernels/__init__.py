"""The step of a sampling loop: a Triton kernel and its launcher, a NumPy twin for the CPU, the textbook reference."""
