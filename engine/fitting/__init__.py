"""Plans fitted to a network's own trajectories: fewer evaluations for the same images, without training.

The engine and everything above may import it; it imports everything from skipstep.errors to loops.

reference  converged trajectories over a grid of timesteps      weights  a plan's weights, by least squares
timesteps  which of them a plan visits, by dynamic programming  report   how good a plan is on noises held out
tune       all of it                                            resume   what an interrupted tuning has computed
judge      a feature network in an ONNX file
"""
