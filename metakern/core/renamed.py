"""Renamed arguments: the old name still works for one release, with a DeprecationWarning."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from metakern.core.warn import warn_user

_F = TypeVar("_F", bound=Callable[..., Any])


def message(old: str, new: str) -> str:
    """Text of the deprecation warning."""
    return f"{old} is now {new}; the old name goes in the next release"


def with_new_names(values: Mapping[str, Any], names: Mapping[str, str], where: str = "") -> dict[str, Any]:
    """``values`` under their new names, with a warning for each old one.

    Args:
        values: values by name
        names: new name by old one
        where: prefix of messages

    Raises:
        TypeError: where a value has both names.
    """
    found = dict(values)
    for old, new in names.items():
        if old in found:
            if new in found:
                raise TypeError(f"{where}{old} is the old name of {new}: give one of them")
            warn_user(where + message(old, new), DeprecationWarning)
            found = {new if name == old else name: value for name, value in found.items()}
    return found


def renamed(**names: str) -> Callable[[_F], _F]:
    """Decorator: a function or constructor also takes arguments by their old names: ``@renamed(old="new")``.

    On a class, the old names work as attributes too.
    """

    def wrap(target: _F) -> _F:
        function: Any = vars(target)["__init__"] if isinstance(target, type) else target

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not names.keys().isdisjoint(kwargs):
                kwargs = with_new_names(kwargs, names)
            return function(*args, **kwargs)

        if not isinstance(target, type):
            return call  # type: ignore[return-value]
        target.__init__ = call  # type: ignore[misc]
        for old, new in names.items():
            setattr(target, old, _OldAttribute(f"{target.__name__}.{old}", new))
        return target

    return wrap


class _OldAttribute:
    """Descriptor that forwards an attribute's old name to its new one."""

    def __init__(self, name: str, new: str) -> None:
        self.name, self.new = name, new

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        warn_user(message(self.name, self.new), DeprecationWarning)
        return getattr(owner, self.new)

    def __set__(self, owner: Any, value: Any) -> None:
        warn_user(message(self.name, self.new), DeprecationWarning)
        setattr(owner, self.new, value)
