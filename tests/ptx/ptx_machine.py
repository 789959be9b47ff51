"""Runs PTX on NumPy arrays, all threads of all blocks of a launch at once.

Threads walk together while they agree where to go; where they part, those that are least far go first, so that they
meet again. An opcode that is not in the tables is an error that names it: so a new compiler's new instruction is seen.
Arithmetic is IEEE's, as the opcode says: `.rn` or exact, denormals kept, `.ftz` unknown; not so ex2.approx, div.full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx_memory import SHARED, SHIFT, Memory
from ptx_parser import Instruction, Kernel, Operand

Lanes = NDArray[Any]
WARP = 32
SHARED_BYTES = 1 << 16
_DTYPES = {f"{kind}{8 * size}": f"{code}{size}" for kind, code in ("si", "uu", "bu") for size in (1, 2, 4, 8)}
_DTYPES |= {"f16": "f2", "f32": "f4", "f32x2": "f4", "f64": "f8"}
_COMPARE: Mapping[str, Any] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_REDUCE: Mapping[str, Any] = {"min": np.min, "max": np.max, "add": np.sum}
_LOGIC: Mapping[str, Any] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


class UnknownOpcodeError(AssertionError):
    """An instruction that this machine does not have."""


def _bfloat16(x: Lanes) -> Lanes:
    """float32 rounded to bfloat16, to nearest and even, as its 16 bits."""
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _shift_left(a: Lanes, by: Lanes) -> Lanes:
    bits = 8 * a.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def _shift_right(a: Lanes, by: Lanes) -> Lanes:
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, 0).astype(a.dtype)


def _permute(a: Lanes, b: Lanes, select: Lanes) -> Lanes:
    whole = a.astype(np.uint64) | (b.astype(np.uint64) << 32)
    result = np.zeros(a.shape, np.uint32)
    for place in range(4):
        code = (select >> (4 * place)) & 0xF
        byte = ((whole >> (8 * (code & 7)).astype(np.uint64)) & 0xFF).astype(np.uint32)
        result |= np.where(code & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype(np.uint32) << (8 * place)
    return result


def _extract(a: Lanes, start: Lanes, length: Lanes) -> Lanes:
    """`length` bits from `start` on; of a signed number with the sign of the last. Both are constants here."""
    first, count, bits = int(start.flat[0]), int(length.flat[0]), 8 * a.itemsize
    return a << a.dtype.type(bits - first - count) >> a.dtype.type(bits - count)


def _lop3(a: Lanes, b: Lanes, c: Lanes, table: Lanes) -> Lanes:
    result = np.zeros_like(a)
    for row in range(8):
        if int(table.flat[0]) >> row & 1:
            terms = (each if row >> (2 - k) & 1 else ~each for k, each in enumerate((a, b, c)))
            result |= np.bitwise_and.reduce(list(terms))
    return result


# By opcode without its type, the type being the last part: a function of the operands in that type.
_SAME_TYPE: Mapping[str, Callable[..., Lanes]] = {
    "add": np.add, "add.rn": np.add, "sub": np.subtract, "sub.rn": np.subtract, "mul.rn": np.multiply,
    "mul.lo": np.multiply, "mad.lo": lambda a, b, c: a * b + c, "div.rn": np.divide, "sqrt.rn": np.sqrt,
    "min": np.fmin, "max": np.fmax, "min.NaN": np.minimum, "max.NaN": np.maximum, "not": np.invert,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "shl": _shift_left, "shr": _shift_right,
    "div.full": np.divide, "prmt": _permute, "lop3": _lop3, "bfe": _extract,
    "ex2.approx": lambda x: np.exp2(x.astype(np.float64)).astype(np.float32),
}  # fmt: skip
_WIDE = {"mul.wide": lambda a, b: a * b, "mad.wide": lambda a, b, c: a * b + c, "mul.hi": lambda a, b: a * b >> 32}


class Machine:
    """One launch. `arguments` are addresses and numbers in the order of the kernel's parameters."""

    def __init__(self, kernel: Kernel, memory: Memory, grid: tuple[int, int], arguments: Sequence[int]) -> None:
        self.kernel, self.memory = kernel, memory
        blocks = grid[0] * grid[1]
        count = blocks * kernel.threads
        self.thread = np.arange(count)
        self.block = self.thread // kernel.threads
        tid = (self.thread % kernel.threads).astype(np.uint32)
        zero = np.zeros(count, np.uint32)
        self.special = {
            "tid.x": tid, "ctaid.x": (self.block % grid[0]).astype(np.uint32), "ntid.x": zero + kernel.threads,
            "ctaid.y": (self.block // grid[0]).astype(np.uint32), "nctaid.x": zero + grid[0],
            "nctaid.y": zero + grid[1], "laneid": tid % WARP, "tid.y": zero, "tid.z": zero,
        }  # fmt: skip
        self.parameters = dict(zip(kernel.parameters, arguments, strict=True))
        self.registers: dict[str, Lanes] = {}
        self.epoch = np.zeros(blocks, np.int64)
        # Instructions that threads have executed.
        self.steps = 0

    def run(self) -> None:
        code, end = self.kernel.instructions, len(self.kernel.instructions)
        where = np.zeros(self.thread.size, np.int64)
        here = 0
        with np.errstate(all="ignore"):
            while here < end:
                active = None if (where == here).all() else where == here
                following, taken = here + 1, None
                each = code[here]
                if each.opcode[0] == "bra":
                    taken = self._guard(each, active)
                    following = self.kernel.labels[each.operands[0].symbol]
                elif each.opcode[0] == "ret":
                    assert not each.predicate
                    following = end
                else:
                    self._execute(each, active)
                at_here = slice(None) if active is None else active
                if each.opcode[0] == "bra" and taken is not None:
                    where[at_here] = here + 1
                    where[taken] = following
                else:
                    where[at_here] = following
                self.steps += where.size if active is None else int(active.sum())
                here = int(where.min())

    def _guard(self, each: Instruction, active: Lanes | None) -> Lanes | None:
        """The threads that it concerns; None: all."""
        if not each.predicate:
            return active
        holds = self.registers[each.predicate] != each.unless
        return holds if active is None else holds & active

    def _execute(self, each: Instruction, active: Lanes | None) -> None:
        base, lanes = each.opcode[0], self._guard(each, active)
        if base == "bar":
            if active is not None:
                raise AssertionError(f"a barrier that some threads do not reach: {each.text}")
            self.epoch += 1
        elif base in ("ld", "st", "red", "atom"):
            if lanes is None or lanes.any():
                self._access(each, lanes)
        elif base in ("shfl", "redux"):
            assert lanes is None, each.text
            self._exchange(each)
        elif base == "mov":
            self._move(each, lanes)
        elif base == "setp":
            self._compare(each, lanes)
        elif base == "selp":
            a, b = (self._read(operand, each.opcode[-1]) for operand in each.operands[1:3])
            self._write(each.operands[0], np.where(self._predicate(each.operands[3]), a, b), lanes)
        elif base == "cvt":
            self._convert(each, lanes)
        elif each.opcode[-1] == "pred":
            values = [self._predicate(operand) for operand in each.operands[1:]]
            self._write(each.operands[0], np.logical_not(*values) if base == "not" else _LOGIC[base](*values), lanes)
        else:
            self._write(each.operands[0], self._computed(each), lanes)

    def _computed(self, each: Instruction) -> Lanes:
        *name, kind = each.opcode
        operation, values = ".".join(name), each.operands[1:]
        if operation in _WIDE:
            wide = np.int64 if kind[0] == "s" else np.uint64
            narrow = [self._read(operand, kind).astype(wide) for operand in values[:2]]
            rest = [self._read(operand, f"{kind[0]}64") for operand in values[2:]]
            found = _WIDE[operation](*narrow, *rest)
            return found.astype(_DTYPES[kind]) if operation == "mul.hi" else found
        if operation in ("add.rn.f32", "sub.rn.f32"):
            # The first operand is in half precision, and exact in float32.
            a, b = self._read_float(values[0], kind), self._read(values[1], "f32")
            return a + b if operation[0] == "a" else a - b
        if operation in ("neg", "abs"):
            (a,) = (self._read(operand, kind) for operand in values)
            return -a if operation == "neg" else np.abs(a)
        if operation not in _SAME_TYPE or kind not in _DTYPES:
            raise UnknownOpcodeError(f"{'.'.join(each.opcode)} for {self.kernel.target}: {each.text}")
        shifts = operation in ("shl", "shr")
        kinds = [kind, "u32"] if shifts else [kind] * len(values)
        found = _SAME_TYPE[operation](*(self._read(operand, k) for operand, k in zip(values, kinds, strict=True)))
        return found.astype(_DTYPES[kind], copy=False)

    def _read(self, operand: Operand, kind: str) -> Lanes:
        dtype = np.dtype(_DTYPES[kind])
        if operand.number is not None:
            bits = operand.number & (1 << 8 * dtype.itemsize) - 1
            return np.broadcast_to(np.array(bits, f"u{dtype.itemsize}").view(dtype), self.thread.shape)
        if operand.symbol:
            assert operand.symbol == "global_smem", operand
            # Shared memory has its own addresses, of 32 bits; each block's begins at its own place.
            return np.zeros(self.thread.shape, dtype)
        array = self.special.get(operand.register)
        array = self.registers.get(operand.register) if array is None else array
        if array is None:
            # A compiler may move a register that was never written, if the result is not used.
            array = self._unwritten(operand.register)
        if kind == "f32x2" or array.itemsize == dtype.itemsize:
            return array.view(dtype)
        return array.astype(f"u{dtype.itemsize}").view(dtype)

    def _read_float(self, operand: Operand, kind: str) -> Lanes:
        """A half-precision register as float32."""
        if kind == "bf16":
            return (self._read(operand, "u16").astype(np.uint32) << 16).view(np.float32)
        return self._read(operand, kind).astype(np.float32)

    def _write(self, operand: Operand, value: Lanes, lanes: Lanes | None) -> None:
        name = operand.register
        size = self.kernel.sizes[name.rstrip("0123456789")]
        if size == 1:
            value = np.broadcast_to(value, self.thread.shape).astype(np.bool_)
        elif value.dtype.kind == "f":
            value = np.ascontiguousarray(value).view(f"u{size}")
        elif value.itemsize < size and value.dtype.kind == "i":
            value = value.astype(f"i{size}").view(f"u{size}")
        else:
            value = np.broadcast_to(value, self.thread.shape).astype(f"u{size}")
        if lanes is not None:
            held = self.registers.get(name)
            value = np.where(lanes, value, self._unwritten(name) if held is None else held)
        self.registers[name] = value

    def _unwritten(self, name: str) -> Lanes:
        """What a register holds before it is written: bits that show where they are used."""
        size = self.kernel.sizes[name.rstrip("0123456789")]
        return np.zeros(self.thread.shape, bool) if size == 1 else np.full(self.thread.shape, 0x7FC5, f"u{size}")

    def _predicate(self, operand: Operand) -> Lanes:
        found: Lanes = self.registers[operand.register]
        return found

    def _move(self, each: Instruction, lanes: Lanes | None) -> None:
        to, source = each.operands
        kind = each.opcode[-1]
        if to.vector or source.vector:
            size = int(kind[1:]) // 8
            half = f"u{8 * size // 2}"
            if to.vector:
                whole = self._read(source, f"u{8 * size}")
                for place, part in enumerate(to.vector):
                    if part.symbol != "_":
                        self._write(part, (whole >> whole.dtype.type(4 * size * place)).astype(_DTYPES[half]), lanes)
            else:
                low, high = (self._read(part, half).astype(f"u{size}") for part in source.vector)
                self._write(to, low | (high << high.dtype.type(4 * size)), lanes)
        elif kind == "pred":
            value = (
                np.full(self.thread.shape, bool(source.number)) if source.register == "" else self._predicate(source)
            )
            self._write(to, value, lanes)
        else:
            self._write(to, self._read(source, kind), lanes)

    def _compare(self, each: Instruction, lanes: Lanes | None) -> None:
        kind, name = each.opcode[-1], each.opcode[1]
        a, b = (self._read(operand, kind) for operand in each.operands[1:3])
        unordered = name == "nan" or (name.endswith("u") and len(name) == 3)
        if name not in _COMPARE and not unordered:
            raise UnknownOpcodeError(each.text)
        found = np.zeros(a.shape, np.bool_) if name == "nan" else _COMPARE[name[:2]](a, b)
        if unordered:
            found = found | np.isnan(a) | np.isnan(b)
        elif kind[0] == "f" and name == "ne":
            found = found & ~np.isnan(a) & ~np.isnan(b)
        if len(each.opcode) == 4:
            found = _LOGIC[each.opcode[2]](found, self._predicate(each.operands[3]))
        self._write(each.operands[0], found, lanes)

    def _convert(self, each: Instruction, lanes: Lanes | None) -> None:
        *rounding, to, source = each.opcode[1:]
        half = source in ("f16", "bf16")
        read = self._read_float if half else self._read
        values = [read(operand, source) for operand in each.operands[1:]]
        if rounding not in ([], ["rn"]):
            raise UnknownOpcodeError(each.text)
        if to in ("f16x2", "bf16x2"):
            high, low = (_bfloat16(v) if to == "bf16x2" else v.astype(np.float16).view(np.uint16) for v in values)
            found = (high.astype(np.uint32) << 16) | low
        elif to == "bf16":
            found = _bfloat16(values[0])
        else:
            found = values[0].astype(_DTYPES[to])
        self._write(each.operands[0], found, lanes)

    def _exchange(self, each: Instruction) -> None:
        """Between the lanes of a warp."""
        source = self._read(each.operands[1], each.opcode[-1]).reshape(-1, WARP)
        if each.opcode[:2] == ("redux", "sync") and each.opcode[2] in _REDUCE:
            found = np.repeat(_REDUCE[each.opcode[2]](source, axis=1).astype(source.dtype), WARP)
        elif each.opcode[:2] == ("shfl", "sync") and each.opcode[2] in ("idx", "bfly"):
            lane = np.arange(WARP)
            by = self._read(each.operands[2], "u32").reshape(-1, WARP).astype(np.int64)
            found = np.take_along_axis(source, (by if each.opcode[2] == "idx" else lane ^ by) % WARP, axis=1).ravel()
            if self.kernel.threads == WARP:
                # What a lane gives away it has loaded before; in a block of one warp that orders its lanes.
                self.epoch += 1
        else:
            raise UnknownOpcodeError(each.text)
        self._write(each.operands[0], found, None)

    def _access(self, each: Instruction, lanes: Lanes | None) -> None:
        kind, space = each.opcode[-1], each.opcode[1]
        address = next(operand for operand in each.operands if operand.address)
        if space == "param":
            number = self.parameters[address.symbol]
            value = np.full(self.thread.shape, np.array(number).astype(_DTYPES[kind]))
            self._write(each.operands[0], value, lanes)
            return
        size, where = int(kind[1:]) // 8, np.flatnonzero(lanes) if lanes is not None else self.thread
        start = self._read(Operand(address.register, symbol=address.symbol), "u64" if space == "global" else "u32")
        places = start[where].astype(np.int64) + address.offset
        if space == "global" and (places >> SHIFT == SHARED).any():
            raise AssertionError(f"a global access to no address of a buffer: {each.text}")
        if space == "shared":
            if (places < 0).any() or (places + 16 > SHARED_BYTES).any():
                raise AssertionError(f"outside of shared memory: {each.text}")
            places = places + SHARED_BYTES * self.block[where] + (SHARED << SHIFT)
        stamp = (self.block[where] << 32) | self.epoch[self.block[where]]
        if each.opcode[0] in ("red", "atom"):
            if each.opcode[-2:] != ("min", "s32"):
                raise UnknownOpcodeError(each.text)
            # What an atom gives back, the older Triton's form, our kernels do not read.
            self.memory.reduce_min(places, self._read(each.operands[-1], "s32")[where])
            return
        value = next(operand for operand in each.operands if not operand.address)
        parts = value.vector or (value,)
        if each.opcode[0] == "st":
            values = np.stack([self._read(part, f"u{8 * size}")[where] for part in parts])
            self.memory.store(places, size, values, where, stamp)
            return
        for part, loaded in zip(parts, self.memory.load(places, size, len(parts), where, stamp), strict=True):
            whole = np.zeros(self.thread.shape, loaded.dtype)
            whole[where] = loaded
            self._write(part, whole, lanes)
