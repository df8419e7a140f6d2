"""Detects clones that compute with the original model's parameters instead of their own.

In the autograd graph a clone's parameters are ``clone()`` nodes of the original's. A result that reaches an original
parameter by any other path was computed with the original itself, and does not adapt.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from metakern.core.torch_private import pytree
from metakern.inner_loop.substitution import Replaced, named_parts

#: Nodes of the autograd graph.
Nodes = set[Any]


class Lineage:
    """The ancestry of a clone, as nodes of the autograd graph.

    Attributes:
        begin: ``clone()`` nodes of the parameters of the clone and its ancestors, and nodes of other tensors that these
            held when they were cloned
        original: the model that was cloned
        own: nodes of the clone's parameters after its last step; searches stop there
        strangers: nodes of parameters that the model holds unregistered, and the attributes that hold them
    """

    def __init__(self) -> None:
        self.begin: Nodes = set()
        self.own: Nodes = set()
        self.strangers: dict[Any, str] | None = None
        self.original: Callable[[], nn.Module | None] = lambda: None
        self._near: Nodes = set()  # begin without the ancestors' nodes
        self._clones: list[tuple[str, str, Any]] = []  # module, parameter, clone() node
        self._ancestors: Lineage | None = None
        self._origins: dict[Any, str] | None = None

    def __reduce__(self) -> tuple[type[Lineage], tuple[()]]:
        """Copies and pickles start empty, as graph nodes can be neither copied nor pickled."""
        return Lineage, ()

    @property
    def origins(self) -> dict[Any, str]:
        """Nodes of the ancestors' parameters, and their names; made when a search first needs them, which is rare."""
        if self._origins is None:
            origins = {} if self._ancestors is None else dict(self._ancestors.origins)
            for prefix, name, node in self._clones:
                origins.setdefault(node.next_functions[0][0], f"{prefix}.{name}" if prefix else name)
            self._origins = origins
        return self._origins

    def of_clone(self, original: nn.Module, memo: Replaced, held: Nodes) -> Lineage:
        """The lineage of a clone of ``original``, the module that this lineage belongs to.

        Args:
            original: the module that was cloned
            memo: its parts and their copies
            held: nodes of other tensors in the original, computed before
        """
        lineage, near, has_past = Lineage(), set(held), False
        for prefix, part in named_parts(original):
            for name, p in part._parameters.items():
                node = None if p is None else memo[id(p)][1].grad_fn
                if p is not None and node is not None:
                    near.add(node)
                    lineage._clones.append((prefix, name, node))
                    has_past = has_past or p.grad_fn is not None
            for buffer in part._buffers.values():
                if id(buffer) in memo:
                    near.add(memo[id(buffer)][1].grad_fn)
        near.discard(None)
        lineage.begin = lineage._near = near
        if has_past:  # otherwise the original was detached, and keeping its ancestry would waste memory
            lineage.begin, lineage._ancestors = near | self.begin, self
        if self.strangers is None:  # once for all clones of a learner: it looks through every attribute
            strangers = [(where, p) for where, p in unregistered(original) if p.requires_grad]
            with torch.enable_grad():
                self.strangers = {accumulator(p): where for where, p in strangers}
        lineage.strangers = self.strangers
        lineage.original = weakref.ref(original)
        return lineage

    def reached(self, roots: Iterable[Any], given: Any = ()) -> dict[Any, str]:
        """Nodes of original or unregistered parameters that ``roots`` reach other than by the clone's parameters.

        Args:
            roots: nodes of the computed tensors
            given: pytree of the call's arguments
        """
        roots = list(roots)
        if not _reaches_leaves(roots, self._near | self.own):
            return {}
        stops = self.begin | self.own
        found = reach(roots, stops, {**self.origins, **self.strangers} if self.strangers else self.origins)
        if not found:
            return found
        # Tensors passed to the clone may depend on the original: that is the caller's intention.
        known = [tensor for tensor in pytree.tree_leaves(given) if isinstance(tensor, Tensor)]
        leaves = {id(tensor) for tensor in known}
        targets = {node: name for node, name in found.items() if id(getattr(node, "variable", None)) not in leaves}
        return reach(roots, {*stops, *nodes_of(known)}, targets)


def reach(roots: Iterable[Any], stops: Nodes, targets: dict[Any, str]) -> dict[Any, str]:
    """The targets that can be reached from the roots without passing a stop."""
    found = {}
    stack = [root for root in roots if root not in stops]
    seen = {*stops, *stack}
    for root in stack:
        if root in targets:
            found[root] = targets[root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node in targets:
                found[node] = targets[node]
            elif node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    return found


def _reaches_leaves(roots: Iterable[Any], stops: Nodes) -> bool:
    """Whether any leaf of the graph can be reached without passing a stop."""
    stack = [root for root in roots if root not in stops]
    seen = {*stops, *stack}
    while stack:
        following = stack.pop().next_functions
        if not following:
            return True
        for node, _ in following:
            if node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    return False


def recomputes(roots: Iterable[Any], stops: Nodes) -> bool:
    """Whether a graph contains torch.utils.checkpoint, which calls the model again in the backward.

    That call uses the parameters that the module holds at that time; they must still be those of the forward.
    """
    stack = [root for root in roots if root not in stops]
    seen = {*stops, *stack}
    while stack:
        current = stack.pop()
        kind = type(current)
        for name in _SAVED.get(kind) or _saved_names(kind):
            try:
                value = getattr(current, name)
            except RuntimeError:  # freed by a backward
                continue
            for saved in value if isinstance(value, tuple) else (value,):
                if _is_checkpointed(saved):
                    return True
        for node, _ in current.next_functions:
            if node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    return False


#: By type of a node of C++, names of the attributes with its saved tensors, still packed. These types live for ever.
_SAVED: dict[type, list[str]] = {}


def _saved_names(kind: type) -> list[str]:
    if issubclass(kind, FunctionCtx):  # of a custom autograd.Function; torch.vmap makes such a type for each call
        return ["_raw_saved_tensors"]
    if kind not in _SAVED:
        _SAVED[kind] = [name for name in dir(kind) if name.startswith("_raw_saved_")]
    return _SAVED[kind]


def _is_checkpointed(saved: Any) -> bool:
    if getattr(saved, "unpack_hook", None) is None:
        return False
    return type(saved.data).__module__ == "torch.utils.checkpoint"


def named_parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """``list(model.named_parameters())`` in half the time, which matters when cloning small models."""
    found: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in named_parts(model):
        for name, p in module._parameters.items():
            if p is not None and id(p) not in found:
                found[id(p)] = (f"{prefix}.{name}" if prefix else name, p)
    return list(found.values())


def nodes_of(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """The ``grad_fn`` nodes of tensors that have one."""
    return (tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None)


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors in a module's output: a tensor, a tree of tensors, or objects with tensors as attributes."""
    if isinstance(output, Tensor):
        yield output
        return
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (type, types.FunctionType, nn.Module)):
            yield from (value for value in vars(leaf).values() if isinstance(value, Tensor))


def accumulator(leaf: Tensor) -> Any:
    """The AccumulateGrad node of a leaf, which adds to ``grad`` under a mutex; gradients must be enabled."""
    node: Any = leaf.view_as(leaf).grad_fn
    return node.next_functions[0][0]


# ------------------------------------------------------------------------------------------------- what models hold


def unregistered(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters in plain attributes, lists and unregistered modules of a model, and the attribute that holds them."""
    registered = {id(p) for p in model.parameters()}
    found: dict[int, tuple[str, nn.Parameter]] = {}
    modules = {id(module) for module in model.modules()}
    for where, value in _attributes(model):
        for held in _inside(value):
            parameters = held.parameters() if isinstance(held, nn.Module) and id(held) not in modules else (held,)
            for p in parameters:
                if isinstance(p, nn.Parameter) and id(p) not in registered:
                    found.setdefault(id(p), (where, p))
    return list(found.values())


def foreign(model: nn.Module, original: nn.Module | None) -> list[str]:
    """References from a clone's module to the original's parts that cloning could not replace, as messages."""
    if original is None:
        return []
    names = {id(module): f"module {name!r}" if name else "the model" for name, module in original.named_modules()}
    names |= {id(p): f"parameter {name!r}" for name, p in original.named_parameters()}
    found = []
    for where, value in _attributes(model):
        for held in _inside(value, anything=True):
            name = names.get(id(held))
            if name is not None:
                found.append(f"{where!r} ({_kind(value)}) refers to {name} of the original")
                break
    return found


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All attributes outside the module registries, with their names."""
    registries = nn.Module().__dict__.keys() - {"_forward_hooks", "_forward_pre_hooks"}
    for prefix, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name not in registries:
                yield f"{prefix}.{name}" if prefix else name, value


def _inside(value: Any, anything: bool = False, depth: int = 4) -> Iterator[Any]:
    """An attribute's value and, recursively, its elements; with ``anything`` also what functions and objects use."""
    yield value
    if depth == 0 or isinstance(value, (str, bytes, Tensor, nn.Module)):
        return
    held: list[Any] = []
    if isinstance(value, dict):
        held = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        held = list(value)
    elif anything:
        held = used_by(value)
    for inner in held:
        yield from _inside(inner, anything, depth - 1)


def used_by(value: Any) -> list[Any]:
    """The objects that a function or an object refers to."""
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, types.BuiltinMethodType):
        return [value.__self__]
    if isinstance(value, types.FunctionType):
        cells = []
        for cell in value.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:
                continue
        known = value.__globals__
        return [*cells, *(known[name] for name in value.__code__.co_names if name in known)]
    if isinstance(value, (type, types.ModuleType)):
        return []
    return list(getattr(value, "__dict__", {}).values())


def _kind(value: Any) -> str:
    return "a function" if isinstance(value, types.FunctionType) else type(value).__name__


def listed(names: Sequence[str], limit: int = 6) -> str:
    """Names for a message, at most ``limit`` of them."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"[{shown}{', …' if len(names) > limit else ''}]"
