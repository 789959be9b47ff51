"""What is sampled: a network's state, conditions and checkpoint. ADD A MODEL FAMILY here.

Calls and everything above may import it; it imports skipstep.errors, storage, kernels and plans. Checkpoint folders
(read_checkpoint, load_unet) are in skipstep.networks.checkpoint, which a bundle does not need.
"""

from skipstep.networks.condition import Condition
from skipstep.networks.spec import NetworkSpec, check_plan_fits, network_batch_sizes

__all__ = ["Condition", "NetworkSpec", "check_plan_fits", "network_batch_sizes"]
