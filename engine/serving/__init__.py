"""Serving: many callers, one engine, every evaluation shared. `Batcher` is its door.

policy.py    which samples the next evaluation takes: a function of jobs, costs and a clock
cost.py      milliseconds of an evaluation by its rows, from a calibration
flight.py    the samples under way, each at its own stage of its own plan; one turn is one evaluation
batcher.py   callers' threads, futures, the worker
"""

from skipstep.serving.batcher import Batcher
from skipstep.serving.flight import SampleFuture

__all__ = ["Batcher", "SampleFuture"]
