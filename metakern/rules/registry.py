"""Registry of rules by name: classes for loading saved rules, and :func:`make` for new ones."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import nn

from metakern.rules.protocol import Params, Rule, named_leaves

_R = TypeVar("_R", bound=type[Rule])

_rules: dict[str, type[Rule]] = {}


class _Variant(NamedTuple):
    """A rule with a short name of its own besides those of the classes."""

    make: Callable[..., Rule]
    needs_params: bool


_variants: dict[str, _Variant] = {}

#: A word of a class's name: an acronym, or a capital letter with the small ones after it.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+")


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

    Example:
        >>> metakern.rules.get("Adam")
        <class 'metakern.rules.adam.Adam'>
    """
    if name not in _rules:
        raise ValueError(
            f"rule must be one of {', '.join(_rules)}, got {name!r}; metakern.rules.register makes others known"
        )
    return _rules[name]


def name_of(rule: type[Rule]) -> str:
    """The registered name of a class, or else its own."""
    return next((name for name, known in _rules.items() if known is rule), rule.__name__)


# ------------------------------------------------------------------------------------------------- rules by short name


def add_variant(name: str, make: Callable[..., Rule], *, needs_params: bool = False) -> None:
    """Add a short name for a rule.

    Args:
        name: in kebab-case
        make: makes the rule; its keyword arguments are the options
        needs_params: whether its first argument are the parameters, by name
    """
    _variants[name] = _Variant(make, needs_params)


def names() -> list[str]:
    """The names that :func:`make` takes, in kebab-case and sorted.

    Example:
        >>> "coordinatewise-lstm" in metakern.rules.names()
        True
    """
    short = {_plain(name) for name in _variants}
    return sorted([*_variants, *(_kebab(name) for name in _rules if _plain(name) not in short)])


def options_of(name: str) -> list[str]:
    """Names of a rule's options.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    return _options(_variant(name))


def make(name: str, options: Mapping[str, Any] | None = None, *, params: Params = None, learned: bool = False) -> Rule:
    """A new rule by its name, with fresh weights.

    Args:
        name: in kebab-case, as in :func:`names`, or a class's registered name: ``"adam"``, ``"hierarchical-rnn"`` or
            ``"HierarchicalRNN"``. ``"sgd"`` is :class:`GradientDescent`, ``"meta-sgd"`` and ``"lslr"`` are its class
            methods.
        options: keyword arguments of the rule; missing ones take their defaults
        params: tensors [*shape], a tree as the rule's steps get it, for rules with weights for every parameter
        learned: whether ``lr`` is learned where it is a number: it becomes an ``nn.Parameter``. Rules with weights of
            their own, and without ``lr``, stay as they are.

    Raises:
        TypeError: for a name that is no string, and for options of a wrong type
        ValueError: for an unknown name or option, which the message lists; for missing ``params``; and for options out
            of range.

    Example:
        >>> rule = metakern.rules.make("momentum", {"lr": 0.1, "nesterov": True})
    """
    variant = _variant(name)
    given, known = dict(options or {}), _options(variant)
    for option in given:
        if option not in known:
            raise ValueError(f"options of rule {name!r} are {', '.join(known) or 'none'}; got {option!r}")
    if variant.needs_params and params is None:
        raise ValueError(f"params must be given for rule {name!r}, which has rates for every parameter")
    for option in _required(variant):
        if option not in given:
            raise ValueError(f"options of rule {name!r} must hold {option!r}, got {list(given) or 'none'}")
    rule = variant.make(named_leaves(params), **given) if variant.needs_params else variant.make(**given)
    rate = getattr(rule, "lr", None) if learned and "lr" in known else None
    if isinstance(rate, (float, int)) and next(rule.parameters(), None) is None:
        rule = variant.make(**{**given, "lr": nn.Parameter(torch.tensor(float(rate)))})
    return rule


def as_rule(rule: Any, name: str = "rule") -> Any:
    """A rule that is ready for use, from itself or its name.

    Args:
        rule: a module, which is returned as it is, or the name of a rule without weights, such as ``"adam"``
        name: of the argument in messages

    Raises:
        ValueError: for an unknown name, and the name of a rule that must be trained first.
    """
    if not isinstance(rule, str):
        return rule
    variant = _variant(rule)
    made = None if variant.needs_params or _required(variant) else variant.make()
    if made is None or next(made.parameters(), None) is not None:
        raise ValueError(
            f"{name} must be trained or a rule without weights, got the name {rule!r}: make it by "
            "metakern.rules.make and train it, or load a trained one by metakern.rules.load"
        )
    return made


def _variant(name: str) -> _Variant:
    """The rule of a name, whatever its spelling."""
    if not isinstance(name, str):
        raise TypeError(f"rule must be a name, got {type(name).__name__}")
    plain = _plain(name)
    for known, variant in _variants.items():
        if _plain(known) == plain:
            return variant
    for known, rule in _rules.items():
        if _plain(known) == plain:
            return _Variant(rule, False)
    raise ValueError(
        f"rule must be one of {', '.join(names())}, got {name!r}; metakern.rules.register makes others known"
    )


def _parameters(variant: _Variant) -> list[inspect.Parameter]:
    """The options in the order of the signature; ``**options`` of a class method are those of its constructor."""
    parameters = list(inspect.signature(variant.make).parameters.values())[int(variant.needs_params) :]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        own = {p.name for p in named}
        of_class = inspect.signature(getattr(variant.make, "__self__", variant.make)).parameters.values()
        named += [p for p in of_class if p.name not in own and p.kind is not p.VAR_KEYWORD]
    return named


def _options(variant: _Variant) -> list[str]:
    return [p.name for p in _parameters(variant)]


def _required(variant: _Variant) -> list[str]:
    return [p.name for p in _parameters(variant) if p.default is p.empty]


def _kebab(name: str) -> str:
    return "-".join(word.lower() for word in _WORD.findall(name))


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()
