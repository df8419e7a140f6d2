"""Replaces objects wherever a module holds them: registered, and in lists, bound methods and closures."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_M = TypeVar("_M", bound=nn.Module)

#: By id: the object, held so that its id is not reused, and its replacement.
Replaced = dict[int, tuple[Any, Any]]

#: Attribute types that refer to no other objects.
_ATOMS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size, torch.layout}
)

#: The registries of a module's parameters, buffers and submodules.
_REGISTERED = ("_parameters", "_buffers", "_modules")

_COLLECTIONS = frozenset({dict, OrderedDict, list, tuple, set})

#: The dicts and sets that every nn.Module has: parameters, buffers, submodules and hooks.
_REGISTRIES = frozenset(name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)))


def shallow_copy(module: _M) -> _M:
    """A shallow copy of a module; its parameters, buffers, submodules, hooks and attributes can be replaced.

    Compiled code of the original is left out: it is specific to that module, and most of it cannot be differentiated
    twice.
    """
    return copied_with_rest(module)[0]


def copied_with_rest(module: _M) -> tuple[_M, list[str]]:
    """:func:`shallow_copy`, and the names of attributes that may hold unregistered objects."""
    copied: _M = type(module).__new__(type(module))
    held, rest = copied.__dict__, list[str]()
    held.update(module.__dict__)
    held.pop("_compiled_call_impl", None)
    for name, value in held.items():
        kind = type(value)
        if kind in _ATOMS:
            continue
        if name in _REGISTRIES:
            held[name] = value.copy() if value else kind()  # kind() takes half the time
        if (kind not in _COLLECTIONS or value) and name not in _REGISTERED:
            rest.append(name)
    return copied, rest


def named_parts(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """``list(module.named_modules())`` in a fraction of the time, which matters when cloning small models."""
    found: dict[int, tuple[str, nn.Module]] = {}
    _add_parts(module, "", found)
    return list(found.values())


def _add_parts(module: nn.Module, name: str, found: dict[int, tuple[str, nn.Module]]) -> None:
    found[id(module)] = (name, module)
    for inner, part in module._modules.items():
        if part is not None and id(part) not in found:
            _add_parts(part, f"{name}.{inner}" if name else inner, found)


def is_compiled(module: nn.Module) -> bool:
    """Whether the module was returned by ``torch.compile(module)``."""
    dynamo = sys.modules.get("torch._dynamo")  # its import takes seconds, and without it there is no such module
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


class Substitution:
    """Replaces objects in the attributes and registries of modules.

    The search enters lists, tuples, dicts and sets, bound methods, ``functools.partial``, weak references, and the
    closures and defaults of functions; one that holds a replaced object is rebuilt, and the original stays as it is.
    The search does not enter objects of other classes.

    Args:
        replaced: objects and their replacements
        copies: for unregistered modules that hold a replaced object: whether to replace them by a copy, or change them
            in place

    Attributes:
        graph: autograd nodes of the tensors that were found and kept
    """

    def __init__(self, replaced: Replaced, copies: bool) -> None:
        self._replaced, self._copies = replaced, copies
        self._seen: Replaced = {}
        self.graph: set[Any] = set()

    def keep(self, modules: Iterable[nn.Module]) -> None:
        """Exempt the modules from replacement."""
        self._seen.update({id(module): (module, module) for module in modules})

    def fill(self, modules: Sequence[nn.Module], rests: Sequence[list[str] | None] | None = None) -> bool:
        """Replace the objects that the modules hold, in place; returns whether anything changed.

        References among the modules stay. ``rests`` are the names from :func:`copied_with_rest`, where known.
        """
        self.keep(modules)
        known = [None] * len(modules) if rests is None else rests
        filled = [self._fill(module, rest) for module, rest in zip(modules, known, strict=True)]
        return any(filled)

    def _fill(self, module: nn.Module, rest: list[str] | None) -> bool:
        changed = (rest is None or bool(rest)) and self.fill_attributes(module, rest)
        held, replaced, seen = module.__dict__, self._replaced, self._seen
        for registry in _REGISTERED:
            entries = held[registry]
            for name, value in entries.items():
                if value is None:
                    continue
                known = replaced.get(id(value)) or seen.get(id(value))
                new = self(value) if known is None else known[1]
                if new is not value:
                    entries[name] = new
                    changed = True
        if self._copies and is_compiled(module):
            held["forward"] = held["_modules"]["_orig_mod"].__call__
        return changed

    def fill_attributes(self, module: nn.Module, names: list[str] | None = None) -> bool:
        """Replace unregistered objects that ``module`` holds, in place; returns whether anything changed.

        Looks at the attributes in ``names``, or at all.
        """
        changed, held = False, module.__dict__
        for name, value in held.items() if names is None else [(name, held[name]) for name in names]:
            kind = type(value)
            # Of the some 20 attributes of a module, almost all are atoms or registries without an entry.
            if kind in _ATOMS or (kind in _COLLECTIONS and not value) or name in _REGISTERED:
                continue
            new = self(value)
            if new is not value:
                held[name] = new
                changed = True
        return changed

    def __call__(self, value: Any) -> Any:
        """The replacement of ``value``, or ``value`` itself if it holds nothing that is replaced."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        known = self._replaced.get(id(value)) or self._seen.get(id(value))
        if known is not None:
            return known[1]
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                self.graph.add(value.grad_fn)
            return value
        remake = _module if isinstance(value, nn.Module) else _REMAKERS.get(kind)
        if remake is None and isinstance(value, tuple) and hasattr(value, "_fields"):
            remake = _named_tuple
        if remake is None:
            return value
        self._seen[id(value)] = (value, value)  # ends cycles
        new = remake(self, value)
        self._seen[id(value)] = (value, new)
        return new

    def all(self, values: Iterable[Any]) -> tuple[list[Any], bool]:
        """The values after replacement, and whether any changed."""
        old = list(values)
        if _ATOMS.issuperset(map(type, old)):  # long lists of numbers or strings
            return old, False
        new = [self(value) for value in old]
        return new, any(a is not b for a, b in zip(old, new, strict=True))

    def unregistered(self, module: nn.Module) -> nn.Module:
        """An unregistered module, changed in place, or a copy of it."""
        if not self._copies:
            self.fill([module])
            return module
        copied = shallow_copy(module)
        self._seen[id(module)] = (module, copied)
        return copied if self.fill([copied]) else module

    def target(self, value: Any) -> Any:
        """The direct replacement of ``value``, or None."""
        known = self._replaced.get(id(value))
        return None if known is None else known[1]


def _module(substitute: Substitution, value: nn.Module) -> nn.Module:
    return substitute.unregistered(value)


def _sequence(substitute: Substitution, value: Any) -> Any:
    new, changed = substitute.all(value)
    return type(value)(new) if changed else value


def _named_tuple(substitute: Substitution, value: Any) -> Any:
    new, changed = substitute.all(value)
    return type(value)(*new) if changed else value


def _deque(substitute: Substitution, value: deque[Any]) -> deque[Any]:
    new, changed = substitute.all(value)
    return deque(new, value.maxlen) if changed else value


def _dict(substitute: Substitution, value: dict[Any, Any]) -> dict[Any, Any]:
    keys, new_keys = substitute.all(value)
    values, new_values = substitute.all(value.values())
    if not new_keys and not new_values:
        return value
    remade = value.copy()
    remade.clear()
    remade.update(zip(keys, values, strict=True))
    return remade


def _namespace(substitute: Substitution, value: types.SimpleNamespace) -> types.SimpleNamespace:
    new, changed = substitute.all(vars(value).values())
    return types.SimpleNamespace(**dict(zip(vars(value), new, strict=True))) if changed else value


def _method(substitute: Substitution, value: types.MethodType) -> types.MethodType:
    (function, owner), changed = substitute.all((value.__func__, value.__self__))
    return types.MethodType(function, owner) if changed else value


def _weak(substitute: Substitution, value: weakref.ref[Any]) -> weakref.ref[Any]:
    # No rebuilding here: a copy without other references would be freed at once.
    target = substitute.target(value())
    return value if target is None else weakref.ref(target)


def _partial(substitute: Substitution, value: functools.partial[Any]) -> functools.partial[Any]:
    (function, args, keywords, attributes), changed = substitute.all(
        (value.func, value.args, value.keywords, value.__dict__)
    )
    if not changed:
        return value
    remade = functools.partial(function, *args, **keywords)
    remade.__dict__.update(attributes)
    return remade


def _function(substitute: Substitution, value: types.FunctionType) -> Any:
    original = value.__dict__.get("_torchdynamo_orig_callable")
    if original is not None:  # compiled code is specific to the original's modules; copies run uncompiled
        new = substitute(original)
        return value if new is original else new
    cells = [cell for cell in value.__closure__ or () if _is_set(cell)]
    contents, new_cells = substitute.all(cell.cell_contents for cell in cells)
    (defaults, keywords, attributes), new_rest = substitute.all(
        (value.__defaults__, value.__kwdefaults__, value.__dict__)
    )
    if not new_cells and not new_rest:
        return value
    # Unchanged cells are shared, so that other functions with these cells see assignments to them.
    remade_cells = {
        id(cell): types.CellType(content)
        for cell, content in zip(cells, contents, strict=True)
        if content is not cell.cell_contents or content is value
    }
    closure = tuple(remade_cells.get(id(cell), cell) for cell in value.__closure__ or ())
    remade = types.FunctionType(value.__code__, value.__globals__, value.__name__, defaults, closure)
    for cell in remade_cells.values():
        if cell.cell_contents is value:  # a function that calls itself
            cell.cell_contents = remade
    remade.__kwdefaults__ = keywords
    remade.__dict__.update(attributes)
    remade.__qualname__, remade.__module__, remade.__doc__ = value.__qualname__, value.__module__, value.__doc__
    return remade


def _is_set(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


_REMAKERS: Mapping[type, Callable[[Substitution, Any], Any]] = {
    list: _sequence,
    tuple: _sequence,
    set: _sequence,
    frozenset: _sequence,
    deque: _deque,
    dict: _dict,
    OrderedDict: _dict,
    defaultdict: _dict,
    types.SimpleNamespace: _namespace,
    types.MethodType: _method,
    types.FunctionType: _function,
    functools.partial: _partial,
    weakref.ref: _weak,
}
