"""Reading untrusted JSON into dataclasses, by the types of their fields.

    str, int, float, bool, None     exactly these: true is no integer, but 1 is a number
    tuple[X, ...]  tuple[X, Y]      a JSON list, of any length or of exactly this one
    Mapping[str, X]                 a JSON object
    X | None   Literal["a", "b"]    either; one of these
    a dataclass                     a JSON object with exactly its fields
    Any                             any JSON of moderate size and depth
    Annotated[X, rule, ...]         X within the rules below

An unknown or missing field, another type, and a number that is not finite are refused. Every failure is a BundleError
that names the place, from the file's name on; so are the errors that a dataclass raises when it checks itself.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from skipstep.errors import BundleError, ModelFormatError, SkipstepError
from skipstep.storage.verified import check_relative_name

MAX_ITEMS = 4096
_MAX_TEXT = 4096
_MAX_DEPTH = 32
# Every JSON reader has these integers exactly; of plain JSON, whose meaning is unknown here, 64 bits are taken.
_MAX_INTEGER = 1 << 53
_MAX_PLAIN_INTEGER = (1 << 64) - 1

T = TypeVar("T")
Reader = Callable[[Any, str], Any]


@dataclass(frozen=True, slots=True)
class Within:
    """Bounds of a number, both included."""

    low: float
    high: float = _MAX_INTEGER


@dataclass(frozen=True, slots=True)
class Length:
    """Bounds of the number of items, both included."""

    low: int
    high: int = MAX_ITEMS


@dataclass(frozen=True, slots=True)
class Matching:
    """A text that matches the regular expression as a whole; `what` names it in messages."""

    pattern: str
    what: str


@dataclass(frozen=True, slots=True)
class ReadBy:
    """The field's JSON form is not that of its type: `read(value, where)` reads it."""

    read: Reader


class _FileNameRule:
    """A text that is a relative file name; otherwise IntegrityError."""


class _Optional:
    """A field that older writers did not know: where it is absent, the dataclass' default holds."""


ADDED_LATER = _Optional()
FileName = Annotated[str, _FileNameRule()]
Key = Annotated[str, Matching("[0-9a-f]{16}", "16 hexadecimal digits")]
Sha256 = Annotated[str, Matching("[0-9a-f]{64}", "64 hexadecimal digits")]


def parse_json(data: bytes, where: str) -> Any:
    """The value in a file of that name. Raises BundleError, whatever the bytes."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_distinct)
    except (ValueError, RecursionError, MemoryError) as error:
        raise malformed(where, f"no JSON ({error})") from error


def read_json_object(path: Path, *, remedy: str) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint, of which nothing else is checked. Raises ModelFormatError."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct)
        problem = None if isinstance(contents, dict) else f"which holds a JSON {type(contents).__name__}"
        if _is_deeper(contents, _MAX_DEPTH):
            problem = f"which is nested more than {_MAX_DEPTH} levels deep"
    except OSError as error:
        contents, problem = None, f"which cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        contents, problem = None, f"which is no JSON ({error})"
    if problem is not None:
        raise ModelFormatError(got=f"{path}, {problem}", expected="a file with a JSON object", remedy=remedy)
    return contents  # type: ignore[no-any-return]


def read_schema(value: Any, where: str, *, known: int, remedy: str) -> None:
    """Check the number `schema` of a file's object; `remedy` is for files that are older. Raises BundleError."""
    if not isinstance(value, dict) or "schema" not in value:
        raise malformed(where, "no field 'schema'")
    schema = read_value(Annotated[int, Within(1)], value["schema"], f"{where}.schema")
    if schema != known:
        raise BundleError(
            got=f"{where} of schema {schema}",
            expected=f"schema {known}, which this version of skipstep reads",
            remedy="upgrade skipstep" if schema > known else remedy,
        )


def read_dataclass(cls: type[T], value: Any, where: str) -> T:
    """An instance of `cls` from a JSON object. Raises BundleError, IntegrityError for a forbidden file name."""
    if not isinstance(value, dict):
        raise malformed(where, f"a JSON {type(value).__name__} where an object belongs")
    fields = _fields(cls)  # type: ignore[arg-type]  # A class is hashable.
    for name in value:
        if name not in fields:
            raise malformed(where, f"the field {name!r:.80}, which its schema does not have,")
    found: dict[str, Any] = {}
    for name, (hint, optional) in fields.items():
        if name in value:
            found[name] = read_value(hint, value[name], f"{where}.{name}")
        elif not optional:
            raise malformed(where, f"no field {name!r}")
    with own_rules(where):
        return cls(**found)


def read_value(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`. Raises BundleError, IntegrityError for a forbidden file name."""
    rules: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *found = get_args(hint)
        rules = tuple(found)
    for rule in rules:
        if isinstance(rule, ReadBy):
            with own_rules(where):
                return rule.read(value, where)
    result = _read_type(hint, value, where, next((rule for rule in rules if isinstance(rule, Within)), None))
    for rule in rules:
        if isinstance(rule, Length) and not rule.low <= len(result) <= rule.high:
            raise malformed(where, f"{len(result)} items where {rule.low} to {rule.high} belong")
        if isinstance(rule, Matching) and not re.fullmatch(rule.pattern, result):
            raise malformed(where, f"{result!r:.80} where {rule.what} belong")
        if isinstance(rule, _FileNameRule):
            check_relative_name(result)
    return result


@contextmanager
def own_rules(where: str) -> Iterator[None]:
    """Turn the errors of a class that checks itself into BundleErrors of the place."""
    try:
        yield
    except BundleError:
        raise
    except SkipstepError as error:
        raise malformed(where, f"{error.got} (it must be {error.expected})") from error


def malformed(where: str, got: str) -> BundleError:
    return BundleError(
        got=f"{got} in {where}",
        expected="a file of a bundle as skipstep writes it",
        remedy="make the bundle again, or copy it again from where it came",
    )


@lru_cache(maxsize=64)
def _fields(cls: Any) -> dict[str, tuple[Any, bool]]:
    """The fields of a dataclass: their types, and whether they may be absent."""
    hints = {field.name: field.type for field in dataclasses.fields(cls) if field.init}
    if any(isinstance(hint, str) for hint in hints.values()):
        evaluated = get_type_hints(cls, include_extras=True)
        hints = {name: evaluated[name] for name in hints}
    return {name: (hint, ADDED_LATER in getattr(hint, "__metadata__", ())) for name, hint in hints.items()}


def _read_type(hint: Any, value: Any, where: str, bounds: Within | None) -> Any:
    if hint is Any:
        return _read_plain(value, where, _MAX_DEPTH)
    if hint in _SCALARS:
        return _SCALARS[hint](value, where, bounds)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (other,) = (each for each in arguments if each is not type(None))
        return read_value(other, value, where)
    if origin is Literal:
        if type(value) is not str or value not in arguments:
            raise malformed(where, f"{value!r:.80} where one of {', '.join(arguments)} belongs")
        return value
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if origin is Mapping:
        return {name: read_value(arguments[1], each, f"{where}.{name:.80}") for name, each in _members(value, where)}
    if dataclasses.is_dataclass(hint):
        return read_dataclass(hint, value, where)  # type: ignore[arg-type]
    raise TypeError(f"no rule reads {hint} ({where})")


def _read_tuple(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    items = _items(value, where)
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(items)
    elif len(items) != len(hints):
        raise malformed(where, f"{len(items)} items where {len(hints)} belong")
    return tuple(
        read_value(hint, each, f"{where}[{i}]") for i, (hint, each) in enumerate(zip(hints, items, strict=True))
    )


def _members(value: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or len(value) > MAX_ITEMS:
        raise malformed(where, f"a JSON {type(value).__name__} where an object of at most {MAX_ITEMS} fields belongs")
    return list(value.items())


def _items(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise malformed(where, f"a JSON {type(value).__name__} where a list of at most {MAX_ITEMS} items belongs")
    return value


def _read_text(value: Any, where: str, bounds: Within | None) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise malformed(where, f"{value!r:.80} where a text belongs")
    return value


def _read_integer(value: Any, where: str, bounds: Within | None) -> int:
    low, high = (-_MAX_INTEGER, _MAX_INTEGER) if bounds is None else (bounds.low, bounds.high)
    if type(value) is not int or not low <= value <= high:
        raise malformed(where, f"{value!r:.80} where an integer from {low} to {high} belongs")
    return value


def _read_number(value: Any, where: str, bounds: Within | None) -> float:
    largest = sys.float_info.max
    low, high = (-largest, largest) if bounds is None else (bounds.low, bounds.high)
    if type(value) not in (int, float) or not low <= value <= high:
        raise malformed(where, f"{value!r:.80} where a number from {low:g} to {high:g} belongs")
    return float(value)


def _read_boolean(value: Any, where: str, bounds: Within | None) -> bool:
    if not isinstance(value, bool):
        raise malformed(where, f"{value!r:.80} where true or false belongs")
    return value


def _read_plain(value: Any, where: str, depth: int) -> Any:
    """Any JSON of moderate size, for parts whose own readers check them."""
    if depth == 0:
        raise malformed(where, f"JSON that is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        return {name: _read_plain(each, f"{where}.{name:.80}", depth - 1) for name, each in _members(value, where)}
    if isinstance(value, list):
        return [_read_plain(each, where, depth - 1) for each in _items(value, where)]
    if isinstance(value, str):
        return _read_text(value, where, None)
    if type(value) is int and abs(value) > _MAX_PLAIN_INTEGER:
        raise malformed(where, "an integer of more than 64 bits")
    return _read_number(value, where, None) if isinstance(value, float) else value


_SCALARS: Mapping[Any, Callable[[Any, str, Within | None], Any]] = {
    str: _read_text,
    int: _read_integer,
    float: _read_number,
    bool: _read_boolean,
}


def _is_deeper(value: Any, depth: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth == 0 or any(_is_deeper(each, depth - 1) for each in children)


def _distinct(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(members)
    if len(found) != len(members):
        raise ValueError("a name that occurs twice in one object")  # Readers differ in which of the two they take.
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
