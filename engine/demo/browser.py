"""The demo that runs in a browser: its folder, and a server of it on this machine alone.

index.html, *.js, style.css     the page (engine/demo/web)
site.json                       the network and its plans, and the names of their files
graphs/KEY.onnx                 each plan as a resumable loop (skipstep.export.onnx_sampler)
graphs/KEY-inverted.onnx        its inversion, where it has one
graphs/prompted-KEY.onnx        each plan of a model that reads prompts, where there is one
graphs/prompted.onnx            its text encoder; tokenizer.json, its tokenizer
references.bin                  what `skipstep sample` draws: 8-bit, [plans, samples, H, W]
ort/                            onnxruntime-web, from npm
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

import skipstep
from skipstep.bundles.bundle import Bundle, open_bundle
from skipstep.calls.images import to_pil
from skipstep.demo import PICTOGRAMS, PICTOGRAMS_GUIDANCE, SHIPPED_BUNDLE
from skipstep.errors import InputError, MissingDependencyError, SkipstepError, check_integer
from skipstep.export.onnx_sampler import build_sampler
from skipstep.export.partition import partition_of
from skipstep.export.weight_storage import compress_weights, expand_weights
from skipstep.pipelines.spec import FOLDER, SPEC_FILE, read_pipeline_spec
from skipstep.plans.plan import Plan
from skipstep.storage.atomic import check_writable, storage_errors

WEB = Path(__file__).parent / "web"
RUNTIME = (
    "ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.bundle.min.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
# That of `skipstep sample`, whose seeds are 0, 1, 2, … and whose classes take turns.
GUIDANCE = 2.0
# A page whose scripts may share memory, which threads of WebAssembly need, and that fetches nothing from elsewhere.
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",
}


def write_site(folder: Path, packages: Path, *, prompted: Path = PICTOGRAMS) -> None:
    """Write the demo's folder; `packages` is a node_modules that holds onnxruntime-web, and `prompted` the bundle of a
    pipeline without an autoencoder: where there is none, the page has no field for prompts."""
    runtime = packages / "onnxruntime-web" / "dist"
    missing = [name for name in RUNTIME if not (runtime / name).is_file()]
    if missing:
        raise MissingDependencyError(
            got=f"no {missing[0]} in {runtime}",
            expected="onnxruntime-web as engine/demo/web/package.json pins it",
            remedy="run make demo, which installs it with npm",
        )
    check_writable(folder)
    (folder / "ort").mkdir(parents=True, exist_ok=True)
    for page in WEB.iterdir():
        if page.suffix in (".html", ".js", ".css"):
            shutil.copy(page, folder)
    for name in RUNTIME:
        shutil.copy(runtime / name, folder / "ort")
    bundle = open_bundle(SHIPPED_BUNDLE, allow_hard_links=True)
    engine = skipstep.load(SHIPPED_BUNDLE, allow_hard_links=True, backend="onnxruntime", device="cpu")
    network, plans = engine.network, _plans(engine)
    count = len(network.class_names or ())
    drawn = [
        engine.sample(plan=plan, seeds=list(range(count)), class_labels=list(range(count)), guidance_scale=GUIDANCE)
        for plan in plans
    ]
    pixels = np.stack([np.stack([np.asarray(picture) for picture in to_pil(samples)]) for samples in drawn])
    (folder / "references.bin").write_bytes(pixels.tobytes())
    (folder / "graphs").mkdir(exist_ok=True)
    site: dict[str, Any] = {
        "model": bundle.manifest.model,
        "shape": network.sample_shape,
        "classes": network.class_names,
        "guidance": GUIDANCE,
        "references": count,
        "plans": [_entry(plan) for plan in plans],
    }
    for name, graph in site_graphs(bundle, plans):
        (folder / "graphs" / f"{name}.onnx").write_bytes(graph)
    if prompted.is_dir():
        site["prompted"] = _write_prompted(folder, open_bundle(prompted, allow_hard_links=True))
    (folder / "site.json").write_text(json.dumps(site), encoding="utf-8")


def _write_prompted(folder: Path, bundle: Bundle) -> dict[str, Any]:
    """Its text encoder, tokenizer and graphs; what the page is told of it."""
    names = {"tokenizer": "tokenizer.json", "encoder": "graphs/prompted.onnx"}
    for kept, name in zip((f"{FOLDER}/tokenizer-0.json", f"{FOLDER}/text-0.onnx"), names.values(), strict=True):
        (folder / name).write_bytes(bundle.read(kept))
    network = bundle.manifest.network
    spec = read_pipeline_spec(bundle.read(SPEC_FILE), network.sample_shape[0])
    with skipstep.load(bundle.path, allow_hard_links=True, backend="onnxruntime", device="cpu") as engine:
        plans = _plans(engine)
    for name, graph in site_graphs(bundle, plans, inverted=False):
        (folder / "graphs" / f"prompted-{name}.onnx").write_bytes(graph)
    [text] = spec.texts
    return {
        **names,
        "model": bundle.manifest.model,
        "shape": network.sample_shape,
        "factor": spec.factor,
        "length": text.num_tokens,
        "pad": text.pad,
        "guidance": PICTOGRAMS_GUIDANCE,
        "plans": [{**_entry(plan), "key": f"prompted-{plan.key}"} for plan in plans],
    }


def _plans(engine: skipstep.Engine) -> list[Plan]:
    return sorted(engine.plans.values(), key=lambda plan: plan.num_evaluations)


def _entry(plan: Plan) -> dict[str, Any]:
    entry = {"key": plan.key, "steps": plan.steps, "evaluations": plan.num_evaluations}
    return {**entry, "fitted": plan.solver == "fitted", "inverted": plan.solver == "ddim"}


def site_graphs(bundle: Bundle, plans: Sequence[Plan], *, inverted: bool = True) -> Iterator[tuple[str, bytes]]:
    """Name and graph of each plan, and of the inversion of each that has one."""
    manifest = bundle.manifest
    parts = partition_of({part: expand_weights(bundle.read_graph(file)) for part, file in manifest.graphs.items()})
    build = partial(
        build_sampler,
        parts,
        manifest.network,
        batch_size=None,
        noise="seeds",
        trajectory=True,
        resumable=True,
    )
    for plan in plans:
        yield plan.key, compress_weights(build(plan, guided=True))
        if inverted and plan.solver == "ddim":
            yield f"{plan.key}-inverted", compress_weights(build(plan.inverted(), guided=False))


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = {  # noqa: RUF012  # As the base class has it.
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: every picture would be a line."""


def server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of `folder` on 127.0.0.1; port 0 is any free one. Raises InputError."""
    check_integer("port", port, low=0, high=65535)
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise InputError(
            got=f"port {port}, which cannot be used ({error.strerror})",
            expected="a free port",
            remedy="repeat the command with --port 0, which takes any",
        ) from error


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m skipstep.demo.browser", description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="a node_modules that holds onnxruntime-web")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write and to serve")
    parser.add_argument("--port", type=int, default=8017, help="on 127.0.0.1 (default: 8017)")
    parser.add_argument("--only-write", action="store_true", help="serve nothing")
    options = parser.parse_args(arguments)
    try:
        with storage_errors(options.out):
            write_site(options.out, options.packages)
        if options.only_write:
            print(f"wrote {options.out}")
            return
        serving = server(options.out, options.port)
    except SkipstepError as error:
        sys.exit(str(error))
    with serving:
        print(f"http://127.0.0.1:{serving.server_port}/ draws clothes in your browser; Ctrl+C ends it", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
