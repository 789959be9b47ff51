"""The real tritonserver on loopback, with clients of every kind; writes a finding.

build/triton-server/bin/python tests/serving/triton_run.py --out bench/results/findings/triton-server.json

The binary and its Python backend are those of the package nvidia-pytriton. Fails where an answer is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytriton
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http
from tritonclient.utils import InferenceServerException, shared_memory

from skipstep import load
from skipstep.bench.record import machine_class, write_finding
from skipstep.demo import SHIPPED_BUNDLE
from skipstep.export.triton_server import batcher_repository

HEADER = ["how", "requests", "equal to the engine's", "seconds"]
# Between a sample alone and beside others, where a processor's kernels differ by batch size.
INVARIANCE = 1e-4
STEPS, CLIENTS = (6, 10), 16


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Server:
    """The binary over a repository, in `folder`; ready when made."""

    def __init__(self, repository: Path, folder: Path) -> None:
        home = Path(pytriton.__file__).parent
        backend = folder / "backends/python"
        shutil.copytree(home / "tritonserver/backends/python", backend, dirs_exist_ok=True)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        shutil.copy2(home / f"tritonserver/python_backend_stubs/{version}/triton_python_backend_stub", backend)
        self.http, self.grpc, self.metrics = free_ports(3)
        ports = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}
        command = [home / "tritonserver/bin/tritonserver", f"--model-repository={repository}"]
        command += [
            f"--{name}-{what}" for name, port in ports.items() for what in (f"port={port}", "address=127.0.0.1")
        ]
        command += [f"--backend-directory={backend.parent}", "--disable-auto-complete-config", "--exit-timeout-secs=60"]
        libraries = [str(home.parent / "nvidia_pytriton.libs"), f"{sys.base_prefix}/lib"]
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": ":".join(libraries),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": ":".join(path for path in sys.path if path.endswith("site-packages")),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.log = folder / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready"):
                return
            time.sleep(0.2)
        self.process.kill()
        raise AssertionError(self.log.read_text(errors="replace")[-5000:])

    def listens(self) -> set[str]:
        """The addresses that the server and its children listen on."""
        inodes = set()
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True)
        for pid in [self.process.pid, *map(int, children.stdout.split())]:
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(file))
        lines = [
            line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()
        ]
        return {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes}

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@contextlib.contextmanager
def serving(work: Path) -> Iterator[Server]:
    """Two models in a copy of the shipped bundle, where an export puts them; fashion-stream is decoupled."""
    bundle = work / "fashion.bundle"
    shutil.copytree(SHIPPED_BUNDLE, bundle)
    with load(bundle) as engine:
        files = batcher_repository("fashion-batcher", engine.network, instances=2)
        files |= batcher_repository("fashion-stream", engine.network, decoupled=True)
    files["fashion-batcher/2/model.py"] = files["fashion-batcher/1/model.py"]
    for name, data in files.items():
        (bundle / "server" / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / "server" / name).write_bytes(data)
    server = Server(bundle / "server", work)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def request(kind: Any, seeds: list[int], **fields: Any) -> list[Any]:
    """The inputs of a request, of the HTTP or the gRPC client."""
    types = {"seeds": "UINT64", "steps": "INT32", "class_labels": "INT64", "plan": "BYTES"}
    inputs = []
    for name, value in {"seeds": seeds, **fields}.items():
        dtype = {"UINT64": np.uint64, "INT32": np.int32, "INT64": np.int64, "BYTES": object}.get(
            types.get(name, ""), np.float32
        )
        array = np.array(value if isinstance(value, list) else [value] * len(seeds)).astype(dtype)
        tensor = kind.InferInput(name, [len(seeds), 1], types.get(name, "FP32"))
        tensor.set_data_from_numpy(array.reshape(-1, 1))
        inputs.append(tensor)
    return inputs


def fields_of(n: int) -> dict[str, Any]:
    found: dict[str, Any] = {"seeds": [n] if n % 4 else [n, n + 1000], "steps": STEPS[n % 2]}
    found["class_labels"] = [(seed + n) % 10 for seed in found["seeds"]]
    return {**found, "guidance_scale": 2.0} if n % 3 == 0 else found


def expected(engine: Any, n: int) -> np.ndarray:
    return np.asarray(engine.sample(**fields_of(n)))


def run_all(num: int, draw: Any) -> tuple[dict[int, np.ndarray], float]:
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        drawn = dict(zip(range(num), pool.map(draw, range(num)), strict=True))
    return drawn, time.perf_counter() - started


def over_http(server: Server, num: int) -> tuple[dict[int, np.ndarray], float]:
    with http.InferenceServerClient(f"127.0.0.1:{server.http}", concurrency=CLIENTS, network_timeout=120) as client:
        pending = {}
        started = time.perf_counter()
        for n in range(num):
            pending[n] = client.async_infer("fashion-batcher", request(http, **fields_of(n)))
        drawn = {n: each.get_result().as_numpy("samples") for n, each in pending.items()}
        return drawn, time.perf_counter() - started


def over_grpc(server: Server, num: int) -> tuple[dict[int, np.ndarray], float]:
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        return run_all(
            num, lambda n: client.infer("fashion-batcher", request(grpc, **fields_of(n))).as_numpy("samples")
        )


def over_stream(server: Server, num: int) -> tuple[dict[int, np.ndarray], float]:
    """One stream a client; each request joins the evaluations under way."""

    async def client(mine: range) -> dict[int, np.ndarray]:
        async with grpc_aio.InferenceServerClient(f"127.0.0.1:{server.grpc}") as connection:
            room = asyncio.Semaphore(8)  # Under way at once: together fewer than the Batcher's queue takes.

            async def asked() -> Any:
                for n in mine:
                    await room.acquire()
                    yield {
                        "model_name": "fashion-stream",
                        "inputs": request(grpc, **fields_of(n)),
                        "request_id": str(n),
                    }

            found = {}
            async for result, error in connection.stream_infer(asked()):
                assert error is None, error
                room.release()
                found[int(result.get_response().id)] = result.as_numpy("samples")
                if len(found) == len(mine):
                    break
            return found

    async def all_clients() -> dict[int, np.ndarray]:
        found = await asyncio.gather(*(client(range(first, num, CLIENTS)) for first in range(CLIENTS)))
        return {n: samples for each in found for n, samples in each.items()}

    started = time.perf_counter()
    return asyncio.run(all_clients()), time.perf_counter() - started


def over_shared_memory(server: Server, num: int) -> tuple[dict[int, np.ndarray], float]:
    """Seeds and samples lie in memory that client and server share."""
    size = 4 * 2 * 28 * 28
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:
        name = f"skipstep-{os.getpid()}"
        region = shared_memory.create_shared_memory_region(name, f"/{name}", 16 + size)
        client.register_system_shared_memory(name, f"/{name}", 16 + size)
        drawn, started = {}, time.perf_counter()
        for n in range(num):
            fields = fields_of(n)
            seeds = np.array(fields["seeds"], np.uint64).reshape(-1, 1)
            shared_memory.set_shared_memory_region(region, [seeds])
            inputs = request(grpc, **fields)
            inputs[0] = grpc.InferInput("seeds", seeds.shape, "UINT64")
            inputs[0].set_shared_memory(name, seeds.nbytes)
            output = grpc.InferRequestedOutput("samples")
            output.set_shared_memory(name, size, 16)
            client.infer("fashion-batcher", inputs, outputs=[output])
            shape = [len(seeds), 1, 28, 28]
            drawn[n] = shared_memory.get_contents_as_numpy(region, np.float32, shape, 16).copy()
        seconds = time.perf_counter() - started
        for _ in range(50):  # The server lets go of a request's memory soon after its answer.
            with contextlib.suppress(InferenceServerException):
                client.unregister_system_shared_memory(name)
                break
            time.sleep(0.1)
        assert not client.get_system_shared_memory_status().regions
        shared_memory.destroy_shared_memory_region(region)
    return drawn, seconds


def refusals(server: Server, plan: str) -> int:
    """Our words reach the client; a right request by plan key still passes."""
    client = http.InferenceServerClient(f"127.0.0.1:{server.http}", network_timeout=60)
    cases = (
        ({"seeds": [1], "steps": 11}, "which no plan of this engine has"),
        ({"seeds": [1], "plan": "none"}, "plan='none'"),
        ({"seeds": [1]}, "neither steps nor plan"),
        ({"seeds": [1], "steps": 6, "class_labels": 10}, "class_labels=10"),
        ({"seeds": [1], "steps": 6, "guidance_scale": np.nan}, "guidance_scale="),
        ({"seeds": [1], "deadline_ms": 50.0}, "not calibrated"),
        ({"seeds": [1, 2], "steps": [6, 10]}, "one for all its samples"),
        ({"seeds": list(range(17)), "steps": 6}, "batch-size must be <= 16"),  # The server's own words.
    )
    for fields, words in cases:
        try:
            client.infer("fashion-batcher", request(http, **fields))
        except InferenceServerException as error:
            said = str(error)
        else:
            said = "an answer"
        assert words in said, (fields, said)
    answer = client.infer("fashion-batcher", request(http, [1], plan=plan, class_labels=1), model_version="2")
    assert answer.as_numpy("samples").shape == (1, 1, 28, 28)
    return len(cases)


def stopped_under_load(server: Server, engine: Any, num: int) -> dict[str, int]:
    """SIGTERM while clients send: each gets its samples or an error at once, and none an answer cut short."""
    outcomes: Counter[str] = Counter()
    with grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}") as client:

        def draw(n: int) -> None:
            if n == num // 4:
                server.process.send_signal(signal.SIGTERM)
            try:
                samples = client.infer("fashion-batcher", request(grpc, **fields_of(n)), client_timeout=60).as_numpy(
                    "samples"
                )
            except InferenceServerException as error:
                outcomes["lost" if "Deadline Exceeded" in str(error) else "refused while it stops"] += 1
                return
            outcomes["answered" if np.allclose(samples, expected(engine, n), rtol=0, atol=INVARIANCE) else "wrong"] += 1

        run_all(num, draw)
    outcomes["exit status"] = server.process.wait(120)
    assert not outcomes["wrong"] + outcomes["lost"]
    assert outcomes["answered"] >= num // 4
    return dict(outcomes)


def metric(server: Server, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(load(SHIPPED_BUNDLE, num_threads=1))
        server = stack.enter_context(serving(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        assert {each[-8:] for each in server.listens()} == {"0100007F"}, server.listens()
        images = {n: expected(engine, n) for n in range(options.requests)}
        ways = {
            "HTTP, asynchronous": over_http,
            f"gRPC, {CLIENTS} clients": over_grpc,
            f"gRPC streams into the Batcher, {CLIENTS} clients": over_stream,
            "gRPC, shared memory, one client": over_shared_memory,
        }
        for name, way in ways.items():
            num = options.requests if way is not over_shared_memory else max(1, options.requests // 10)
            drawn, seconds = way(server, num)
            for n in range(num):
                np.testing.assert_allclose(drawn[n], images[n], rtol=0, atol=INVARIANCE, err_msg=f"{name}, {n}")
            equal = sum(np.array_equal(drawn[n], images[n]) for n in range(num))
            rows.append([name, str(num), f"{num}, bit for bit {equal}", f"{seconds:.1f}"])
            print(*rows[-1], sep="  ", flush=True)
        refused = refusals(server, engine.select_plan(steps=6).key)
        answered, evaluations = metric(server, "skipstep_requests"), metric(server, "skipstep_evaluations")
        assert answered == sum(int(row[1]) for row in rows) + 1
        ended = stopped_under_load(server, engine, max(40, options.requests // 2))
    note = (
        f"Shipped model, 6 and 10 steps, a third guided, a quarter of two samples; model in two instances. {refused} "
        f"wrong requests were refused in words. Metrics: {answered:.0f} requests in {evaluations:.0f} evaluations. "
        f"SIGTERM under load: {json.dumps(ended)}. nvidia-pytriton {importlib.metadata.version('nvidia-pytriton')}, "
        f"tritonclient {importlib.metadata.version('tritonclient')}. Machine class: {machine_class()}."
    )
    print(note)
    command = f"build/triton-server/bin/python tests/serving/triton_run.py --requests {options.requests}"
    write_finding(options.out, command=command, header=HEADER, rows=rows, note=note)


if __name__ == "__main__":
    main()
