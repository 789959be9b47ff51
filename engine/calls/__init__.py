"""What a caller passes and gets: requests, conditioning, noise, batches, destinations, trajectories and pictures.

Backends, loops and everything above may import it; it imports skipstep.errors, kernels, plans and networks. Names for
others: SampleRequest and resolve_request (request), Conditioning (conditioning), standard_normal (noise), split_batch
(batching), callers_memory (destination), Trajectory (trajectory), to_pil and labelled_grid (images). They are imported
from their modules, as pictures need Pillow.
"""
