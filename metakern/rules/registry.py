"""Registry of rule classes by name, used to load saved rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from metakern.rules.protocol import Rule

_R = TypeVar("_R", bound=type[Rule])

_rules: dict[str, type[Rule]] = {}


@overload
def register(rule: _R) -> _R: ...
@overload
def register(rule: None = None, *, name: str) -> Callable[[_R], _R]: ...
def register(rule: _R | None = None, *, name: str | None = None) -> _R | Callable[[_R], _R]:
    """Decorator: register a rule class by name, so that :func:`metakern.rules.load` finds it.

    Args:
        rule: a subclass of :class:`metakern.rules.Rule`
        name: its name in saved files; default: the class's own name

    Raises:
        TypeError: for anything but such a class
        ValueError: for a name taken by another class.

    Example:
        >>> @register
        ... class SignDescent(Rule):
        ...     pass
    """

    def add(rule: _R) -> _R:
        given: Any = rule
        if not isinstance(given, type) or not issubclass(given, Rule):
            got = given.__name__ if isinstance(given, type) else f"a {type(given).__name__}"
            raise TypeError(f"rule must be a subclass of metakern.rules.Rule, got {got}")
        chosen = rule.__name__ if name is None else name
        known = _rules.get(chosen)
        # A reloaded module, or a notebook cell run again, redefines the same class.
        if known is not None and (known.__module__, known.__qualname__) != (rule.__module__, rule.__qualname__):
            raise ValueError(f"name {chosen!r} is that of {known.__module__}.{known.__qualname__}; choose another")
        _rules[chosen] = rule
        return rule

    return add if rule is None else add(rule)


def get(name: str) -> type[Rule]:
    """The rule class registered under a name.

    Raises:
        ValueError: for an unregistered name; the message lists the registered ones.
    """
    if name not in _rules:
        raise ValueError(
            f"rule must be one of {', '.join(_rules)}, got {name!r}; metakern.rules.register makes others known"
        )
    return _rules[name]


def name_of(rule: type[Rule]) -> str:
    """The registered name of a class, or else its own."""
    return next((name for name, known in _rules.items() if known is rule), rule.__name__)
