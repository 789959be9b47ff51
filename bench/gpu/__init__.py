"""The gate on a GPU: `make gpu`, or `python -m skipstep.bench.gpu --out out/gpu` from a checkout.

One command, one machine with one NVIDIA GPU, under ten minutes, no registry. Correctness comes first, and what is not
correct gets no number; then proofs about launches and waits, then measurements, compared with the aims. Latencies are
measured by the benchmark suite of skipstep.bench with device=cuda. Every part is a process with a time limit, so one
that crashes or hangs does not end another, and what it measured before is kept. `--dry-run` does the same parts on a
CPU, with a tiny network and Triton's interpreter, to test the gate itself.
"""
