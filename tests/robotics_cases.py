"""What the tests of robot policies share: the statistics of a data set for the tiny policy."""

from __future__ import annotations

import numpy as np
from tiny_policy import CAMERAS, STATE

STATISTICS = {
    STATE: {"min": np.array([-1.0, 0.0, 2.0]), "max": np.array([1.0, 4.0, 2.0])},  # The last never moved.
    "action": {"min": np.array([0.0, -200.0]), "max": np.array([10.0, 300.0])},
    CAMERAS[0]: {"mean": np.full((3, 1, 1), 0.4), "std": np.array([0.2, 0.3, 0.4]).reshape(3, 1, 1)},
}
