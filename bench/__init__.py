"""Benchmarks: skipstep beside what people use today."""
