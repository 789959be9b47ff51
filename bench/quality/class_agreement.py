"""Samples that look like the requested class: `python -m skipstep.bench.quality.class_agreement --out FILE`.

Sample i has seed i and class i mod 10. A separate classifier, trained on the training split, names what it sees; the
share of names that match is the agreement. It says whether samples are recognisable, not whether they are varied.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from skipstep import Engine
from skipstep.bench.quality.classifier import SHIPPED_CLASSIFIER, classify, load_classifier
from skipstep.bench.quality.data import CLASS_NAMES
from skipstep.bench.record import write_json
from skipstep.demo import SHIPPED_MODEL
from skipstep.networks.checkpoint import read_checkpoint


def measure(
    engine: Engine, *, steps: int, num_samples: int, guidance_scale: float, classifier: Path = SHIPPED_CLASSIFIER
) -> dict[str, Any]:
    """Draw and judge `num_samples`; shares in [0, 1], over all and by class, with the plan that drew them."""
    plan = engine.select_plan(steps=steps)
    labels = torch.arange(num_samples) % len(CLASS_NAMES)
    samples = engine.sample(
        plan=plan, seeds=range(num_samples), class_labels=labels.tolist(), guidance_scale=guidance_scale
    )
    seen = classify(load_classifier(classifier), torch.from_numpy(samples).clamp(-1, 1))
    right = seen == labels
    return {
        "steps": steps,
        "plan": repr(plan),
        "plan_key": plan.key,
        "guidance_scale": guidance_scale,
        "num_samples": num_samples,
        "agreement": right.float().mean().item(),
        "agreement_by_class": {
            name: right[labels == label].float().mean().item() for label, name in enumerate(CLASS_NAMES)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL, help="diffusers folder (default: the shipped one)")
    parser.add_argument("--classifier", type=Path, default=SHIPPED_CLASSIFIER, help="what train_classifier wrote")
    parser.add_argument("--num", type=int, default=1000, help="samples (default: 1000)")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 50], help="step counts (default: 10 20 50)")
    parser.add_argument("--guidance", type=float, default=2.0, help="guidance scale (default: 2)")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    options = parser.parse_args()
    engine = Engine.build(options.model, plans=options.steps, batch_sizes=[25])
    facts = {"num_samples": options.num, "guidance_scale": options.guidance, "classifier": options.classifier}
    results = [measure(engine, steps=steps, **facts) for steps in options.steps]
    for result in results:
        print(f"{result['steps']:4d} steps: {result['agreement']:.1%} of {options.num} recognised as their class")
    facts = {
        "model_sha256": read_checkpoint(options.model).digest(),
        "backend": engine.backend,
        "device": engine.device,
    }
    write_json(options.out, {**facts, "results": results})


if __name__ == "__main__":
    main()
