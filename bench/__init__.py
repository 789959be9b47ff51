"""Benchmarks: the pytest plugin, contenders, the regression gate, reports and the GPU gate. May import everything."""
