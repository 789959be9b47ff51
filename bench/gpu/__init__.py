"""The gate on a GPU: `make gpu`, or `python -m skipstep.bench.gpu --out out/gpu` from a checkout.

One command, one machine with one NVIDIA GPU, under ten minutes, no registry. Correctness comes first, and what is not
correct gets no number; then proofs about launches and waits, then measurements, held against the aims. Every part is a
process with a time limit, so one that crashes or hangs takes no other along, and what it measured before stays.
`--dry-run` walks the same parts on a CPU, with a tiny network and Triton's interpreter, to test the gate itself.
"""
