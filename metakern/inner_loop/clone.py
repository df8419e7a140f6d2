"""Clones of modules within the autograd graph and updates of their parameters, with learn2learn's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from metakern.core.checks import check_rate
from metakern.inner_loop.substitution import Replaced, Substitution, copied_with_rest, named_parts, shallow_copy
from metakern.ops.inner_update import step_of_one_task

_M = TypeVar("_M")


def clone_module(module: _M, memo: Replaced | None = None) -> _M:
    """A copy of a module with ``clone()`` of its parameters: gradients flow through the copy to the original.

    Buffers that require gradients are cloned too; other buffers are shared. Shared parameters and submodules stay
    shared in the copy. References of the original to itself become references of the copy to itself: in lists and dicts
    of modules or parameters, bound methods, hooks, a replaced ``forward``, and in the closures and
    ``functools.partial`` of such functions. Modules compiled by torch.compile run uncompiled in a copy.

    Args:
        module: an ``nn.Module``; anything else is returned as it is
        memo: earlier clones: pass the same dict, empty at first, for all modules that share parameters

    Raises:
        TypeError: for modules of torch.jit, which cannot be copied this way
        ValueError: for a lazy module that has no parameters yet

    Example:
        >>> copied = clone_module(net)
        >>> copied(support_x[0]).sum().backward()  # gradients of net
    """
    if not isinstance(module, nn.Module):
        return module
    memo = {} if memo is None else memo
    clone_parts(module, memo)
    copied: _M = memo[id(module)][1]
    return copied


def clone_parts(module: nn.Module, memo: Replaced, also: nn.Module | None = None) -> set[Any]:
    """Copy a module, its registered submodules and their parameters, and enter the copies in ``memo``.

    Args:
        module: left unchanged
        memo: as for :func:`clone_module`
        also: a copy of a module that refers to these parts; its references are redirected to the copies

    Returns:
        autograd nodes of other tensors, which the module and the copies both hold
    """
    made: list[tuple[nn.Module, list[str] | None]] = [] if also is None else [(also, None)]
    made.extend(_copied(part, memo) for _, part in named_parts(module) if id(part) not in memo)
    substitution = Substitution(memo, copies=True)
    substitution.fill([copied for copied, _ in made], [rest for _, rest in made])
    return substitution.graph


def _copied(module: nn.Module, memo: Replaced) -> tuple[nn.Module, list[str]]:
    """:func:`copied_with_rest` of a module, before substitution; enters it and its tensors' clones in ``memo``."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"model must not be scripted or traced, got {type(module).__name__}, whose parameters cannot be replaced: "
            "pass the module that torch.jit was given"
        )
    copied, rest = copied_with_rest(module)
    memo[id(module)] = (module, copied)
    buffers = [buffer for buffer in module._buffers.values() if buffer is not None and buffer.requires_grad]
    for tensor in (*module._parameters.values(), *buffers):
        if tensor is None or id(tensor) in memo:
            continue
        if is_lazy(tensor):
            raise ValueError(
                f"model must have its parameters, but those of {type(module).__name__} take their shapes from the "
                "first call: call the model once before"
            )
        memo[id(tensor)] = (tensor, tensor.clone())
    return copied, rest


def replace_tensors(module: nn.Module, replaced: Replaced) -> None:
    """Replace tensors, in place, wherever the module holds them."""
    Substitution(replaced, copies=False).fill([part for _, part in named_parts(module)])


def captures_tensors(model: nn.Module) -> bool:
    """Whether a model refers to its parameters or buffers other than by registration, e.g. in a list or closure.

    ``torch.func.functional_call`` does not replace such references. nn.LSTM and its kin, whose list it does replace,
    do not count. Scripted modules have no such references.
    """
    whole = (nn.RNNBase, torch.jit.ScriptModule)
    parts = list(model.modules())
    tensors = (tensor for part in parts for held in (part._parameters, part._buffers) for tensor in held.values())
    probe = Substitution({id(tensor): (tensor, None) for tensor in tensors if tensor is not None}, copies=True)
    probe.keep(parts)
    return any(probe.fill_attributes(shallow_copy(part)) for part in parts if not isinstance(part, whole))


def with_tensors(model: nn.Module, replaced: Replaced, holders: Sequence[nn.Module] = ()) -> nn.Module:
    """A copy of a model with its tensors replaced wherever it refers to them.

    Args:
        model: left unchanged
        replaced: its tensors and their replacements
        holders: modules that hold the model; they hold the copy afterwards
    """
    memo = dict(replaced)
    made: list[nn.Module] = []
    for part in model.modules():
        made.append(shallow_copy(part))
        memo[id(part)] = (part, made[-1])
    Substitution(memo, copies=True).fill([*made, *holders])
    return made[0]


def call_with_tensors(model: nn.Module, replaced: Replaced, *args: Any, **kwargs: Any) -> Any:
    """Call a model with its tensors replaced wherever it refers to them.

    Calls a copy. Attributes that the call sets, such as an auxiliary loss, are set on the model, as
    ``torch.func.functional_call`` does.
    """
    copied = with_tensors(model, replaced)
    pairs = list(zip(model.modules(), copied.modules(), strict=True))
    before = [dict(copy.__dict__) for _, copy in pairs]
    result = copied(*args, **kwargs)
    for (part, copy), held in zip(pairs, before, strict=True):
        part.__dict__.update({name: x for name, x in copy.__dict__.items() if held.get(name, held) is not x})
    return result


def update_module(module: _M, updates: Sequence[Tensor | None] | None = None, memo: Replaced | None = None) -> _M:
    """Replace each parameter p that has an update u by p + u; gradients flow through both.

    Args:
        module: changed in place; the old parameter tensors are not written
        updates: one per parameter, in the order of ``module.parameters()``, None for those that stay. Without it,
            parameters and buffers take the update in their attribute ``update``, which becomes None.
        memo: earlier updates: pass the same dict, empty at first, for all modules that share parameters

    Returns:
        ``module``

    Raises:
        ValueError: for another number of updates than parameters, and an update that does not have a parameter's shape

    Example:
        >>> copied = clone_module(net)
        >>> copied = update_module(copied, [-0.1 * p for p in copied.parameters()])
    """
    if not isinstance(module, nn.Module):
        return module
    memo = {} if memo is None else memo
    params = list(module.parameters())
    if updates is not None:
        _check_count("updates", len(updates), len(params))
    given = {} if updates is None else {id(p): u for p, u in zip(params, updates, strict=True)}
    for tensor in (*params, *module.buffers()):
        update = given.get(id(tensor))
        update = getattr(tensor, "update", None) if update is None else update
        if update is None or id(tensor) in memo:
            continue
        new = tensor + update
        if new.shape != tensor.shape:
            raise ValueError(f"an update must have the parameter's shape, {list(tensor.shape)}, got {list(new.shape)}")
        memo[id(tensor)] = (tensor, new)
    for tensor in (*params, *module.buffers()):
        if getattr(tensor, "update", None) is not None:
            tensor.update = None  # type: ignore[attr-defined]
    replace_tensors(module, memo)
    return module


def detach_module(module: Any, keep_requires_grad: bool = False) -> None:
    """Detach the parameters of a module, and buffers that require gradients, from the autograd graph, in place.

    Args:
        module: anything but an ``nn.Module`` is left as it is
        keep_requires_grad: whether tensors that required a gradient still do afterwards; else none does

    Example:
        >>> copied = clone_module(net)
        >>> detach_module(copied)
        >>> copied(support_x[0]).requires_grad
        False
    """
    if not isinstance(module, nn.Module):
        return
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.requires_grad:
            tensor.detach_().requires_grad_(keep_requires_grad)


def maml_update(model: _M, lr: float | Tensor, grads: Sequence[Tensor | None] | None = None) -> _M:
    """Replace each parameter p of a module by p − lr · g; gradients flow through all three.

    Args:
        model: changed in place; the old parameter tensors are not written
        lr: a number, or a tensor of one element
        grads: one per parameter, in the order of ``model.parameters()``, None for those that stay; default: the
            parameters' ``grad``

    Returns:
        ``model``

    Raises:
        TypeError, ValueError: for another number of gradients than parameters, and an ``lr`` that is not finite or has
            more elements

    Example:
        >>> copied = clone_module(net)
        >>> loss = F.cross_entropy(copied(support_x[0]), support_y[0])
        >>> copied = maml_update(copied, 0.1, torch.autograd.grad(loss, copied.parameters(), create_graph=True))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_rate("lr", lr)
    params = list(model.parameters())
    if grads is None:
        grads = [p.grad if p.is_leaf or p.retains_grad else None for p in params]
    _check_count("grads", len(grads), len(params))
    take_step(model, params, grads, lr)
    return model


def take_step(
    model: nn.Module, params: Sequence[Tensor], grads: Sequence[Tensor | None], lr: Any, holder: nn.Module | None = None
) -> list[Tensor]:
    """Replace each parameter that has a gradient by p − lr · g, wherever the module holds it.

    Args:
        model: changed in place
        params: the model's parameters
        grads: one per parameter
        lr: a number, a tensor of one element, or a list of one rate per parameter
        holder: module that holds the model; if given, it gets an updated copy, and the model stays as it is

    Returns:
        the new parameters
    """
    pairs = [(index, g) for index, g in enumerate(grads) if g is not None]
    rates = [lr[index] for index, _ in pairs] if isinstance(lr, list) else lr
    old = [params[index] for index, _ in pairs]
    # Gradients of embeddings with sparse=True are sparse, and no kernel takes them.
    dense = [g if g.layout == torch.strided else g.to_dense() for _, g in pairs]
    new = step_of_one_task(old, dense, rates)
    replaced = {id(p): (p, q) for p, q in zip(old, new, strict=True)}
    if holder is None:
        replace_tensors(model, replaced)
    else:
        with_tensors(model, replaced, [holder])
    return new


def _check_count(name: str, got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(f"{name} must have one entry a parameter, {expected}, got {got}; None leaves one as it is")
