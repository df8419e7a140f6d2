"""Rules by name: what a saved rule's file says, and what loading one looks up."""

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
    """Make a class of rules known by its name, so that :func:`metakern.rules.load` finds it; a decorator.

    Args:
        rule: a subclass of :class:`metakern.rules.Rule`
        name: what saved files call it; default: the class's own name

    Raises:
        TypeError: for anything else than such a class
        ValueError: for a name that another class has.

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
        # A module that is loaded again, or a cell of a notebook that is run again, defines the same class anew.
        if known is not None and (known.__module__, known.__qualname__) != (rule.__module__, rule.__qualname__):
            raise ValueError(f"name {chosen!r} is that of {known.__module__}.{known.__qualname__}; choose another")
        _rules[chosen] = rule
        return rule

    return add if rule is None else add(rule)


def get(name: str) -> type[Rule]:
    """The class of rules that is registered under a name.

    Raises:
        ValueError: for a name that is not; the message lists those that are.
    """
    if name not in _rules:
        raise ValueError(
            f"rule must be one of {', '.join(_rules)}, got {name!r}; metakern.rules.register makes others known"
        )
    return _rules[name]


def name_of(rule: type[Rule]) -> str:
    """The name that a class is registered under, or its own."""
    return next((name for name, known in _rules.items() if known is rule), rule.__name__)
