"""Functions over an engine that start from images or between noises."""
