"""Starting from images or between two noises: inversion, editing and interpolation, as functions over an engine.

The engine and everything above may import it; it imports everything from skipstep.errors to loops. Names for others:
Inversion and invert (inversion), slerp and slerp_grid (interpolation). They are imported from their modules, as plain
sampling needs none of them.
"""
