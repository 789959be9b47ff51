"""What the tests of fitted plans have in common."""

MEAN, DEVIATION = 0.3, 0.7
SHAPE = (1, 4, 4)
SMALL = {"noises": 16, "held_out": 16, "nodes": 24, "rounds": 1}
WEIGHTS = [[0.5, 0.5, 0.1, 0.1, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0]]
