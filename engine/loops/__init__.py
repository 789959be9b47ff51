"""How a plan is walked: the loop contract, its forms, and the runner that splits a request over batch sizes.

Imports backends, cuda, calls and everything below; latency, editing, bundles, export and the engine import it.

Names for others: Loop, Run, Lifecycle, Sampler and run_observed (contract), make_loop (choice), BatchRunner and
CompiledNetwork (runner), HostLoop (stepwise), CudaLoop (captured, needs torch). ADD A LOOP FORM in choice.py.

contract   what every loop offers the engine        runner     splits, enqueues, waits once
choice     which form runs on which device          observers  progress, callbacks, trajectories
stepwise   the host loop and its pool of buffers
captured   the GPU loop; structure: what its graphs are made for; programs: its three forms; workspace and buffers: the
           memory that its graphs read
"""
