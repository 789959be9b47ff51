"""The driver that executes refuses what a real one would crash on; otherwise the tests on it would show nothing."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
from executing_cuda import cubin_of
from step_binaries import step_facts

from skipstep.cuda.driver import CudaDriver
from skipstep.cuda.queue import Queue
from skipstep.edge.blocks import Block, Field, as_floats, bfloat16_bits
from skipstep.errors import DeviceUnavailableError


@pytest.fixture
def queue(cuda):
    return Queue(CudaDriver())


def test_work_waits_until_somebody_does(queue):
    memory, pinned = queue.zeros(64, ExitStack()), queue.pinned(64)
    pinned.bytes[:] = 1
    queue.copy_in(memory, pinned)
    pinned.bytes[:] = 2
    queue.synchronize()
    queue.copy_out(pinned, memory)
    queue.synchronize()
    # What was written after the copy was enqueued, and before it ran, is what arrived.
    assert set(pinned.bytes.tolist()) == {2}


def test_memory_that_was_given_back_is_not_read(cuda, queue):
    releases = ExitStack()
    memory, pinned = queue.zeros(64, releases), queue.pinned(64)
    graph = queue.capture(lambda: queue.copy_out(pinned, memory), ExitStack())
    releases.close()
    queue.launch(graph)
    with pytest.raises(AssertionError, match=r"64 bytes at .* are no device memory"):
        queue.synchronize()


def test_memory_is_not_given_back_under_work(queue):
    releases = ExitStack()
    memory, pinned = queue.zeros(64, releases), queue.pinned(64)
    queue.copy_out(pinned, memory)
    with pytest.raises(AssertionError, match="while work is queued"):
        releases.close()


def test_no_memory_is_taken_while_a_graph_is_recorded(queue):
    with pytest.raises(AssertionError, match="while a graph is recorded"):
        queue.capture(lambda: queue.zeros(64, ExitStack()), ExitStack())
    with pytest.raises(DeviceUnavailableError, match="CAPTURE_UNSUPPORTED from cuStreamSynchronize"):
        queue.capture(queue.synchronize, ExitStack())
    # The stream does not go on recording.
    queue.synchronize()


def test_nothing_runs_without_a_context(cuda, queue):
    with pytest.raises(AssertionError, match="no context"):
        cuda.cuMemsetD8Async(0, 0, 1, queue.handle)


def test_a_cubin_of_another_architecture_does_not_load(cuda, queue):
    with pytest.raises(DeviceUnavailableError, match="NO_BINARY_FOR_GPU from cuModuleLoadData"):
        queue.driver.load(cubin_of(step_facts(86)), "ddim_step_kernel")


def test_pinned_memory_is_used_again_only_after_its_copies(queue):
    memory, first = queue.zeros(1 << 20, ExitStack()), queue.pinned(1 << 20)
    queue.copy_in(memory, first)
    queue.record(first)
    queue.give_back(first)
    done = queue.driver._cuda.handles[first.done]
    for _ in range(20):
        taken = queue.pinned(1 << 20)
        assert taken.address != first.address or done["done"]
        if taken.address == first.address:
            return
    raise AssertionError("it never comes back")


def test_rows_of_a_padded_field_begin_at_aligned_addresses(queue):
    fields = {"a": Field((3, 2, 5), "float32", padded=True), "b": Field((2,), "int64"), "c": Field((2, 3), "bfloat16")}
    block = Block(queue, fields, ExitStack())
    memory = queue.pinned(block.memory.num_bytes)
    values = np.arange(30, dtype=np.float32).reshape(3, 2, 5)
    block.write(memory, "a", values)
    block.write(memory, "b", [7, 8])
    block.write(memory, "c", np.array([[1.0, -2.5, 3.0], [np.nan, np.inf, 1e-3]], np.float32))
    queue.copy_in(block.memory, memory)
    queue.synchronize()
    device = queue.driver._cuda
    for row, expected in enumerate(values):
        address = block.part("a").address + 256 * row
        assert np.array_equal(device.floats(address, (2, 5)), expected)
    assert device.floats(block.part("b").address, (2,), "int64").tolist() == [7, 8]
    halves = device.floats(block.part("c").address, (2, 3), "uint16")
    assert as_floats(halves, "bfloat16").tolist()[0] == [1.0, -2.5, 3.0]


def test_bfloat16_is_rounded_as_torch_rounds():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bfloat16_bits(values), expected)
    assert np.isnan(as_floats(bfloat16_bits(np.array([np.nan], np.float32)), "bfloat16")).all()
