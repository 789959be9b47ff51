"""Numbers known before a call: schedules, spacings, solvers and plans. ADD A SOLVER in solvers.py."""
