"""One step of a sampling loop: the Triton kernels, their launchers, the NumPy implementation and the references.

May import `errors` and `storage`; everything else may import this. Importing the package loads nothing: `launch` and
`layout` need no library, `step_numpy` and `statistics` need NumPy, `reference` needs torch, and `step`, `autotune` (to
measure) and the kernel modules need torch and Triton.

For use elsewhere: `layout.Column`, `NUM_COLUMNS`, `StepFlags` and `Stream`; `step.ddim_step` and `initial_noise`;
`step_numpy.NumpyStep`; `statistics.Thresholding` and `sample_statistics`; `launch.StepLaunch`, `choose_launch`,
`DEFAULT_LAUNCH` and `step_constants`; `autotune.LaunchCase`, `TunedLaunch` and `tune_on_device`. `reference` is for
tests.
"""
