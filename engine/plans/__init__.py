"""Numbers known before a call: schedules, spacings, solvers and plans. ADD A SOLVER in solvers.py or multistep.py.

Everything above may import it; it imports skipstep.errors, storage and kernels.
"""

from skipstep.plans.plan import Plan
from skipstep.plans.schedule import NoiseSchedule
from skipstep.plans.solvers import SOLVERS
from skipstep.plans.spacing import SPACINGS
from skipstep.plans.stages import Stages

__all__ = ["SOLVERS", "SPACINGS", "NoiseSchedule", "Plan", "Stages"]
