"""Every numerical tolerance of the suite, with its reason."""

# A few operations in float64.
FLOAT64 = 1e-13

# A cumulative product of a thousand float32 factors, as diffusers forms it, against float64: each factor and each
# product rounds by up to 6e-8, and the errors of a thousand add up as a random walk at worst times a few.
FLOAT32_SCHEDULE = 2e-5

# A whole DDIM loop against diffusers', both float32, relative 2-norm: our table folds divisions into factors, so each
# step rounds in another order; 250 steps of it stay below this with a factor of two to spare.
DIFFUSERS_LOOP = 5e-6

# The same for schedulers that walk in sigma or lambda: they form differences of float32 logarithms, each of which
# carries a relative error of 6e-8 times its size of about 5.
DIFFUSERS_SIGMA_LOOP = 2e-5

# DDPMScheduler's beta is 1 - a/p in float32, which near p = 1 keeps three digits of a number near 1e-4.
DIFFUSERS_DDPM_LOOP = 2e-5

# One step of it, relative 2-norm: a handful of float32 roundings, and x0 = x/sqrt(a) - ... cancels where a is small.
DIFFUSERS_STEP = 3e-7
# With sample prediction eps = (x - sqrt(a)·x0)/sqrt(1-a) cancels where a is near 1, by up to 1/(1-a) = 100.
DIFFUSERS_STEP_SAMPLE = 3e-6

# Normals (up to 6.7) from float32 polynomials for ln, sin and cos, against float64: u itself is rounded to float32,
# which near u = 1 moves r = sqrt(-2 ln u) by up to 2^-25/r, largest for the smallest r.
NORMAL_ABSOLUTE = 2e-4

# One step in float32 against float64, relative to the largest term, (|x| + |out|)/sqrt(a): four roundings of it at
# worst (coefficient, product, sum, and the guidance before them), each half a unit in the last place (6e-8).
STEP_RELATIVE = 2.4e-7

# The general update with random coefficients of size 1: some ten float32 roundings of terms up to 30 times the result.
GENERAL_UPDATE = 2e-6

# One unit in the last place of bfloat16 (8 significant bits), relative.
BFLOAT16_ULP = 2.0**-7

# A GroupNorm in float32 against float64, relative to the larger of 1 and its largest value: a mean of 5 spreads of 1
# cancels three bits, and the exponential of SiLU has a few units in the last place.
GROUP_NORM = 4e-6

# The same sample alone and in a batch, pixels in [-1, 1]: a convolution may sum in another order at another batch size
# (float32, a few layers), and a loop of a few steps carries that on. torch is off by up to 1.2e-4 with AVX-512 of AMD.
BATCH_INVARIANCE = 3e-4

# Two float32 implementations of one network over a few guided steps, pixels in [-1, 1].
BACKENDS_AGREE = 1e-3

# A float32 loop of ten or twenty steps on closed-form data of size 1 against the same in float64: the first step's
# x0 = x/sqrt(a) - ... magnifies rounding by up to 1/sqrt(a) = 157, and later steps shrink it again.
FLOAT32_LOOP = 5e-5

# A float32 network of a few dozen layers, split into parts that a runtime optimises apart, relative to its largest
# output: each layer rounds by 6e-8, and what is fused is rounded once where two roundings stood.
FLOAT32_NETWORK = 5e-6

# Latents of a pipeline in twenty steps against diffusers', relative to the largest value: text encoder and network in
# two runtimes, guidance up to 7.5. Small pipelines are off by 2e-6.
PIPELINE_LATENTS = 1e-4

# Its decoded pictures in 8 bits: which share of the pixels is off by at most one value.
PIPELINE_PIXELS = 0.999

# Normal numbers of torch's generator from NumPy's logarithm and cosine, whose last bits differ.
TORCH_NOISE = 2e-6

# A float32 network whose shapes are fixed, which a runtime then lays out and fuses in another way, over a few steps and
# guidance up to 3 that magnify its rounding, from timestep 599 down (1/sqrt(a) = 6.2), relative to the largest value.
# Small UNets stay below 7e-6.
STATIC_SHAPES = 1e-5

# The shipped model on another device in float32, over whole loops with guidance up to 2, pixels in [-1, 1]: it sums in
# another order, as above; the six shipped plans stay below 4e-6.
WEBGPU_LOOP = 1e-5

# A network of a few dozen layers, products and activations in half precision and normalisations in float32; the largest
# error relative to the largest output. Each activation rounds by 2^-11 (float16) or 2^-8 (bfloat16), and those of all
# layers add up at random: eight of them in one direction are two to three times what small UNets show.
FLOAT16_NETWORK = 8 * 2.0**-11
BFLOAT16_NETWORK = 8 * 2.0**-8

# A loop of a few steps with a small random network in half precision against the same in float32, relative to the
# largest value: the network's rounding, which the first step magnifies by up to 1/sqrt(a) = 157 before it clips.
HALF_PRECISION_LOOP = {"float16": 0.1, "bfloat16": 0.5}

# The shipped model's images in ten guided steps, pixels in [-1, 1], with its network in bfloat16 on the CPU against
# float32: twice the largest difference of 64 images (bench/results/findings/cpu-precisions.json).
BFLOAT16_PIXEL = 0.12
