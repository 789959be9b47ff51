"""Methods that live in other modules, which are imported when a method is first asked for: starting costs nothing."""

from __future__ import annotations

import importlib
from typing import Any


class Later:
    """A module, imported when an attribute of it is first asked for through a class that has it.

    `method = Later("package.module").function` in the body of a class is `method = module.function`.
    """

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return _Delegate(self._module, name)


class _Delegate:
    def __init__(self, module: str, function: str) -> None:
        self._module, self._function = module, function

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner, name

    def __get__(self, instance: object, owner: type) -> Any:
        function = getattr(importlib.import_module(self._module), self._function)
        # From now on it is the class's own.
        setattr(self._owner, self._name, function)
        return function if instance is None else function.__get__(instance, owner)
