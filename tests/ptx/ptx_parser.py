"""PTX text as instructions: labels resolved to numbers, operands told apart. Only what Triton writes is understood."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

_SIZES = {"pred": 1, "b16": 2, "b32": 4, "b64": 8}
_NUMBER = re.compile(r"-?(?:0x[0-9A-Fa-f]+|\d+)U?$")


@dataclass(frozen=True)
class Operand:
    """One of: a register or special register, a vector of operands, an address, a number, a label or symbol."""

    register: str = ""
    vector: tuple[Operand, ...] = ()
    address: bool = False
    offset: int = 0
    number: int | None = None
    symbol: str = ""


@dataclass(frozen=True)
class Instruction:
    """`opcode` split at its points; `predicate` guards it, `unless` the predicate where it is negated."""

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str = ""
    unless: bool = False
    text: str = ""


@dataclass(frozen=True)
class Kernel:
    """`parameters` are names and bytes; `sizes` maps a register's prefix to its bytes; `labels` to instructions."""

    name: str
    parameters: dict[str, int]
    threads: int
    sizes: dict[str, int]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    target: str


@lru_cache(maxsize=256)
def parse(ptx: str) -> Kernel:
    """The one kernel of a module."""
    head, _, body = ptx.partition("\n{\n")
    name = re.search(r"\.entry (\w+)\(", head)
    threads = re.search(r"\.reqntid (\d+)", head)
    target = re.search(r"\.target (\w+)", head)
    assert name is not None, head
    assert threads is not None, head
    assert target is not None, head
    parameters = {
        found[2]: int(found[1]) // 8 for found in re.finditer(r"\.param \.[a-z](\d+)[^,\n]*?(\w+_param_\d+)", head)
    }
    sizes, labels, instructions = {}, {}, []
    text = re.sub(r"//[^\n]*", "", body)
    for kind, prefix in re.findall(r"\.reg \.(\w+)\s+%([a-z]+)<\d+>;", text):
        sizes[prefix] = _SIZES[kind]
    text = re.sub(r"\.reg [^;]*;", "", text)
    for statement in re.split(r"[;\n]|(?<=:)", re.sub(r"\{[^}\n]*\}", lambda found: found[0].replace("\n", " "), text)):
        statement = statement.strip()
        if re.fullmatch(r"\$?\w+:", statement):
            labels[statement[:-1]] = len(instructions)
        elif statement and statement not in "{}" and not statement.startswith("."):
            instructions.append(_instruction(statement))
    return Kernel(name[1], parameters, int(threads[1]), sizes, tuple(instructions), labels, target[1])


def _instruction(text: str) -> Instruction:
    guard = re.match(r"@(!?)(%p\d+)\s+", text)
    opcode, _, rest = (text[guard.end() :] if guard else text).partition(" ")
    opcode, _, more = opcode.partition("\t")
    operands = _operands(f"{more} {rest}".strip())
    predicate, unless = (guard[2][1:], guard[1] == "!") if guard else ("", False)
    return Instruction(tuple(opcode.split(".")), operands, predicate, unless, text)


def _operands(text: str) -> tuple[Operand, ...]:
    pieces = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", text)
    return tuple(_operand(piece.strip()) for piece in pieces if piece.strip())


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return Operand(vector=_operands(text[1:-1]))
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        inner = _operand(base)
        return Operand(inner.register, address=True, offset=int(offset or 0), symbol=inner.symbol)
    if text[0] == "%":
        return Operand(register=text[1:])
    if re.match(r"0[fd][0-9A-F]+$", text):
        return Operand(number=int(text[2:], 16))
    if _NUMBER.match(text):
        return Operand(number=int(text.rstrip("U"), 0))
    return Operand(symbol=text)
