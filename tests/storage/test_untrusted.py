"""Untrusted JSON by the types of a dataclass's fields: what fits is read, and everything else is refused by place."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from hostile_json import JSON, fuzz
from hypothesis import given

from skipstep.errors import BundleError, InputError, IntegrityError, check_choice, check_integer, check_number
from skipstep.storage.untrusted import ADDED_LATER, FileName, Key, Length, ReadBy, Within, read_dataclass


@dataclass(frozen=True)
class Inner:
    low: int
    high: int

    def __post_init__(self):
        if self.low > self.high:
            raise InputError(got=f"low={self.low}", expected="at most high", remedy="swap them")


@dataclass(frozen=True)
class Outer:
    text: str
    count: Annotated[int, Within(1, 9)]
    share: float
    flag: bool
    kind: Literal["a", "b"]
    maybe: Annotated[float, Within(0.0, 1.0)] | None
    pair: tuple[int, int]
    items: Annotated[tuple[Inner, ...], Length(1, 2)]
    names: Mapping[str, FileName]
    key: Key
    plain: Mapping[str, Any]
    doubled: Annotated[int, ReadBy(lambda value, where: 2 * value)]
    added: Annotated[str | None, ADDED_LATER] = None


GOOD = {
    "text": "x",
    "count": 9,
    "share": 1,
    "flag": True,
    "kind": "a",
    "maybe": None,
    "pair": [1, 2],
    "items": [{"low": 1, "high": 2}],
    "names": {"n": "a/b"},
    "key": "0123456789abcdef",
    "plain": {"x": [None, 1.5, {"y": 2**64 - 1}]},
    "doubled": 4,
}


def test_what_fits_is_read():
    read = read_dataclass(Outer, GOOD, "file")
    assert read == Outer(**{**GOOD, "pair": (1, 2), "items": (Inner(1, 2),), "doubled": 8})
    assert type(read.share) is float
    assert read_dataclass(Outer, {**GOOD, "maybe": 1, "added": "y"}, "file").added == "y"


DEEP: Any = []
for _ in range(40):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("text", [None, 1, "x" * 5000]),
        ("count", [0, 10, True, 1.0, "1", 10**400]),
        ("share", [True, "1", None, float("nan"), float("inf"), 10**400]),
        ("flag", [1, 0, None]),
        ("kind", ["c", 1, None, ["a"]]),
        ("maybe", [-0.1, 1.1, "0"]),
        ("pair", [[1], [1, 2, 3], 1, [1, 2**60]]),
        ("items", [[], [{"low": 1, "high": 2}] * 3, [{"low": 1}], [{"low": 2, "high": 1}], [None], {}, [0] * 5000]),
        ("names", [[], {"n": 1}, {str(i): "a" for i in range(5000)}]),
        ("key", ["0123", "0123456789ABCDEF", "0123456789abcdef\n"]),
        ("plain", [DEEP, {"x": DEEP}, {"x": 2**64}, {"x": -(10**400)}, {"x": float("inf")}, {"x": "x" * 5000}]),
        ("added", [1]),
        ("unknown", [1]),
    ],
)
def test_everything_else_is_refused_by_place(name, values):
    for value in values:
        with pytest.raises(BundleError, match=name):
            read_dataclass(Outer, {**GOOD, name: value}, "file")
    if name in GOOD:
        with pytest.raises(BundleError, match=f"no field '{name}' in file"):
            read_dataclass(Outer, {key: value for key, value in GOOD.items() if key != name}, "file")


def test_errors_of_the_dataclass_and_of_file_names_keep_their_words():
    with pytest.raises(BundleError, match=r"low=2 .*at most high.* in file\.items\[0\]"):
        read_dataclass(Outer, {**GOOD, "items": [{"low": 2, "high": 1}]}, "file")
    with pytest.raises(IntegrityError, match="file name"):
        read_dataclass(Outer, {**GOOD, "names": {"n": "../a"}}, "file")


@given(JSON)
@fuzz(300)
def test_any_value_is_read_or_refused(value):
    for name in GOOD.keys() - {"doubled"}:
        try:
            read_dataclass(Outer, {**GOOD, name: value}, "file")
        except BundleError:
            continue


@pytest.mark.parametrize(
    ("check", "options", "good", "bad"),
    [
        (check_integer, {"low": 0, "high": 5}, [0, 5], [-1, 6, True, 1.0, "1", None]),
        (check_number, {"low": 0.0, "high": 1.0, "above": True}, [1, 0.5], [0, 1.1, True, "1", None, float("nan")]),
        (check_number, {}, [-1e300], [float("inf"), 10**400]),
        (check_choice, {"choices": ("a", "b")}, ["a"], ["c", None, ["a"]]),
    ],
)
def test_arguments_are_checked_by_type_and_range(check, options, good, bad):
    for value in good:
        assert check("size", value, **options) == value
    for value in bad:
        with pytest.raises(InputError, match=r"size=.*Remedy"):
            check("size", value, **options)
