"""skipstep export: compile a model into a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from skipstep.commands.models import (
    MODEL_FORMS,
    add_engine_options,
    add_model_options,
    engine_options,
    model_options,
    plan_options,
)
from skipstep.commands.progress import elapsed_progress
from skipstep.demo import SHIPPED_MODEL, checked_model

DESCRIPTION = "Compile a model into a bundle: a folder that skipstep.load and skipstep sample run."
EPILOG = """\
examples:
  skipstep export --model my-ddpm --steps 10 20 50 --license Apache-2.0 --out my-bundle
      for the CPU; every bundle runs there
  skipstep export --model my-ddpm --target rtx:sm86,sm89,sm120 --precision float16 --license Apache-2.0 --out for-rtx
      with TensorRT-RTX engines, built here, with or without a GPU
  skipstep export --model my-ddpm --target rtx:sm89 --precision int8 --calibration 0 1 2 3 4 5 6 7 --license MIT \
    --out in-8-bits
      with layers in 8 bits, as far as the images stay within a bound; for the CPU, too
  skipstep export --model my-ddpm --target sm_87,tensorrt --precision float16 --license Apache-2.0 --out for-jetson
      for a Jetson: step kernels, and the network for skipstep build to compile there
  skipstep export --model my-stable-diffusion --steps 20 --no-safety-checker --license openrail --out my-sd-bundle
      a whole pipeline: tokenizer, text encoder, network and autoencoder in one bundle
  skipstep export --model unet.onnx --inputs sample=noisy timestep=sigma --scheduler scheduler_config.json \
    --license Apache-2.0 --out from-onnx
      an existing .onnx file; names and shapes that are left out are found, and what was guessed is said

targets, with commas between them:
  cpu         ONNX Runtime: the step network and its tables; always in the bundle
  rtx:smNN    TensorRT-RTX engines (skipstep[rtx])
  sm_NN       step kernels as machine code (skipstep[torch], for Triton)
  tensorrt    the step network in --precision, of which skipstep build makes an engine on the device
  onnx-loop   each plan's whole loop from seeds as one ONNX graph, for hosts that are not Python
  onnx-unrolled  the same without control flow, from given noise, of plans of at most 20 evaluations
  server      models for Triton Inference Server: one for each plan, and the bundle behind a Batcher
  trtexec     the step network at each batch size, the plans as arrays, run.sh and the loop as examples
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=SHIPPED_MODEL, help=f"{MODEL_FORMS} (default: the shipped model's)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the bundle's folder")
    parser.add_argument("--license", required=True, help="of the weights, as an SPDX expression or in words")
    parser.add_argument("--notice", type=Path, metavar="FILE", help="a text that goes along, such as an attribution")
    parser.add_argument("--name", help="of the model (default: its folder's)")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[10, 20, 50], metavar="S", help="plans (default: 10 20 50)"
    )
    parser.add_argument("--eta", type=float, default=0.0, help="of these plans, 0 to 1 (default: 0)")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 16], metavar="B", help="batch sizes (default: 1 16)"
    )
    parser.add_argument("--target", nargs="+", default=["cpu"], metavar="T", help="see below (default: cpu)")
    parser.add_argument(
        "--precision",
        choices=("float32", "float16", "bfloat16", "int8", "fp8"),
        default="float32",
        help="of the network for GPUs; int8 also for the CPU; int8 and fp8 need --calibration (default: float32)",
    )
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign with this private key (skipstep keygen)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    add_model_options(parser)
    add_engine_options(parser)


def run(options: argparse.Namespace) -> None:
    from skipstep.calls.plan_set import make_plan
    from skipstep.commands.inspect import describe_bundle
    from skipstep.engine import Engine
    from skipstep.export.request import BundleRequest, check_request
    from skipstep.quantizing import check_calibration

    # What is wrong with the request is said now, and not after compiling.
    checked_model(options.model)
    said, defaults = model_options(options), plan_options(options)
    calibration, tensorrt = engine_options(options)
    check_calibration(options.precision, calibration)
    plans = [make_plan(steps, defaults, eta=options.eta) for steps in options.steps]
    request = {
        "license": options.license,
        "notice": options.notice,
        "targets": options.target,
        "precision": options.precision,
        "tensorrt": tensorrt,
        "overwrite": options.overwrite,
        "sign_key": options.sign,
    }
    check_request(
        options.out,
        BundleRequest(
            name=options.name or (options.model.name if options.model.is_dir() else options.model.stem), **request
        ),
    )
    progress = elapsed_progress()
    engine = Engine.build(
        options.model,
        plans=plans,
        batch_sizes=options.batch,
        backend="onnxruntime",
        device="cpu",
        progress=progress,
        **said,
    )
    engine.save(options.out, name=options.name, calibration=calibration, progress=progress, **request)
    progress("done")
    print(describe_bundle(options.out))
