"""Reading JSON that nobody has vouched for yet.

Every value is of the expected type and within bounds, every file name stays inside its folder, and what is not
understood is refused rather than ignored. `where` says where a value stands, from the file's name on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from skipstep.errors import BundleError
from skipstep.storage.atomic import check_relative_name

MAX_ITEMS = 4096
_MAX_TEXT = 4096

T = TypeVar("T")


def parse_json(data: bytes, where: str) -> Any:
    """The value in a file of that name. Raises BundleError, whatever the bytes."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError, MemoryError) as error:
        raise malformed(where, f"no JSON ({error})") from error


class Fields:
    """A JSON object whose fields are taken one by one; what is left in the end is refused."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise malformed(where, f"a JSON {type(value).__name__} where an object belongs")
        if len(value) > MAX_ITEMS:
            raise malformed(where, f"{len(value)} fields")
        self._left = dict(value)
        self.where = where

    def take(self, name: str) -> Any:
        if name not in self._left:
            raise malformed(self.where, f"no field {name!r}")
        return self._left.pop(name)

    def optional(self, name: str, read: Callable[[Any, str], T]) -> T | None:
        """None where the field is null; it must be there."""
        value = self.take(name)
        return None if value is None else read(value, f"{self.where}.{name}")

    def added(self, name: str, read: Callable[[Any, str], T]) -> T | None:
        """A field that older writers did not know: None where it is absent or null."""
        return self.optional(name, read) if name in self._left else None

    def text(self, name: str) -> str:
        return read_text(self.take(name), f"{self.where}.{name}")

    def hexadecimal(self, name: str, digits: int) -> str:
        value = self.text(name)
        if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
            raise malformed(f"{self.where}.{name}", f"{value!r:.80} where {digits} hexadecimal digits belong")
        return value

    def integer(self, name: str, *, low: int, high: int = 1 << 53) -> int:
        return read_integer(self.take(name), f"{self.where}.{name}", low, high)

    def number(self, name: str, *, low: float, high: float) -> float:
        return read_number(self.take(name), f"{self.where}.{name}", low, high)

    def boolean(self, name: str) -> bool:
        return read_boolean(self.take(name), f"{self.where}.{name}")

    def nested(self, name: str, read: Callable[[Fields], T]) -> T:
        return read_object(read)(self.take(name), f"{self.where}.{name}")

    def each(self, name: str, read: Callable[[Any, str], T]) -> list[T]:
        where = f"{self.where}.{name}"
        return [read(value, f"{where}[{i}]") for i, value in enumerate(read_list(self.take(name), where))]

    def mapping(self, name: str, read: Callable[[Any, str], T]) -> dict[str, T]:
        return self.nested(name, lambda inner: inner.all(read))

    def all(self, read: Callable[[Any, str], T]) -> dict[str, T]:
        """Every field that is left."""
        found = {name: read(value, f"{self.where}.{name:.80}") for name, value in self._left.items()}
        self._left = {}
        return found

    def finish(self) -> None:
        for name in self._left:
            raise malformed(self.where, f"the field {name!r:.80}, which its schema does not have,")


def read_object(read: Callable[[Fields], T]) -> Callable[[Any, str], T]:
    """A reader of JSON objects that leaves no field unread."""

    def whole(value: Any, where: str) -> T:
        fields = Fields(value, where)
        result = read(fields)
        fields.finish()
        return result

    return whole


def read_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise malformed(where, f"{value!r:.80} where a text belongs")
    return value


def read_integer(value: Any, where: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise malformed(where, f"{value!r:.80} where an integer from {low} to {high} belongs")
    return value


def read_number(value: Any, where: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise malformed(where, f"{value!r:.80} where a number from {low:g} to {high:g} belongs")
    return float(value)


def read_boolean(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise malformed(where, f"{value!r:.80} where true or false belongs")
    return value


def read_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise malformed(where, f"{type(value).__name__} where a list of at most {MAX_ITEMS} belongs")
    return value


def read_file_name(value: Any, where: str) -> str:
    """Raises IntegrityError for a name that leads out of the folder."""
    return check_relative_name(read_text(value, where))


def read_plain(value: Any, where: str) -> Any:
    """Any JSON of moderate size, for parts whose own readers check them."""
    if isinstance(value, dict):
        return Fields(value, where).all(read_plain)
    if isinstance(value, list):
        return [read_plain(each, where) for each in read_list(value, where)]
    if isinstance(value, float) and not math.isfinite(value):
        raise malformed(where, "a number too large to be one")
    return read_text(value, where) if isinstance(value, str) else value


def malformed(where: str, got: str) -> BundleError:
    return BundleError(
        got=f"{got} in {where}",
        expected="a file of a bundle as skipstep writes it",
        remedy="make the bundle again, or copy it again from where it came",
    )


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
