"""Sampling on a GPU: the device as the loops see it, networks in its memory, and loops as CUDA graphs."""
