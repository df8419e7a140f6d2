"""What an update rule is: a module that turns parameters, gradients and a state into new parameters and a new state.

A rule is functional: it changes none of its arguments and keeps nothing between calls, so that a graph can run through
any number of steps and one rule can serve many problems at once. Its own weights are what is meta-learned.

Axis legend: T tasks, N coordinates (scalar parameters of all tasks), ``*shape`` the shape of one parameter tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from metakern.core.task_params import Rebuild, aligned_leaves, flat_params
from metakern.core.torch_private import pytree

#: A tensor, or a dict, list or tuple (nested at will) of tensors: parameters, or gradients of the same structure.
Params = Any

#: What a rule carries from step to step: any pytree whose leaves are tensors. Only its rule looks inside.
State = Any

_Tree = TypeVar("_Tree")


class Rule(nn.Module):
    """Base class of update rules; a rule implements :meth:`init_state` and :meth:`forward`.

    Params are named tensors in a dict, and any other pytree of tensors works too. They are [*shape] each, or, for T
    tasks side by side, [T, *shape] each. Whether there is a task axis is said once, by ``init_state(params,
    tasks=True)``, and the state keeps it for the steps that follow. Rules that treat every coordinate alike do not
    depend on it.

    A rule that counts steps keeps the count in its state, as an integer tensor: [] or, where tasks may have taken
    different numbers of steps, [T].

    Attributes:
        needs_loss: whether ``forward`` needs the argument ``loss``
        horizon: steps that the rule was meta-trained for, or None
        trained_on: what it was meta-trained on, in words, or None
        title: how figures and tables call it
        advice_for_other_networks: how to use it where it was not meta-trained, for its model card
        advice_beyond_horizon: what LearnedOptimizer's warning says to do after ``horizon`` steps
    """

    needs_loss: ClassVar[bool] = False
    title: ClassVar[str] = "Rule"
    advice_for_other_networks: ClassVar[str] = "tune `lr` as for any optimizer, and let it decay"
    advice_beyond_horizon: ClassVar[str] = "let a scheduler decay lr"

    horizon: int | None = None
    trained_on: str | None = None

    def init_state(self, params: Params, *, tasks: bool = False) -> State:
        """The state before the first step.

        Args:
            params: a tensor, or a dict, list or tuple (nested at will) of tensors
            tasks: whether each of them has a leading task axis, [T, *shape]
        """
        raise NotImplementedError

    def forward(
        self, params: Params, grads: Params, state: State, *, loss: Tensor | None = None
    ) -> tuple[Params, State]:
        """One step. Gradients flow through it to params, grads, state, loss and the rule's weights.

        Args:
            params: as for :meth:`init_state`
            grads: of the structure and shapes of ``params``
            state: from :meth:`init_state` or the step before
            loss: the losses that ``grads`` are the gradients of, [T] with a task axis and [] without; None where the
                caller has none, which a rule with ``needs_loss`` refuses with a ValueError

        Returns:
            new params in the structure of ``params``, new state
        """
        raise NotImplementedError

    def initialisation(self) -> Mapping[str, Tensor] | None:
        """The initial parameters that the rule learns, [*shape] each by name; None if it learns none."""
        return None

    @torch.no_grad()
    def step_(
        self, params: Params, grads: Params, state: State, lr: float = 1.0, *, loss: Tensor | None = None
    ) -> None:
        """One step in place, without a graph: ``params`` and ``state`` are overwritten.

        Args:
            params: as for :meth:`forward`, likewise all below
            grads: of the structure and shapes of ``params``
            state: from :meth:`init_state` or the step before
            lr: factor of the update
            loss: the losses that ``grads`` are the gradients of
        """
        new, new_state = self(params, grads, state, loss=loss)
        for old, p in zip(pytree.tree_leaves(params), pytree.tree_leaves(new), strict=True):
            old.copy_(p if lr == 1 else torch.lerp(old, p, lr))
        for old, x in zip(pytree.tree_leaves(state), pytree.tree_leaves(new_state), strict=True):
            old.copy_(x)

    def select_tasks(self, state: State, index: Tensor, params: Params) -> State:
        """The state of some tasks: what the rule would carry if it had stepped those alone.

        Args:
            state: of T tasks
            index: integers [T'], or bool [T]
            params: that the state belongs to, [T, *shape] each
        """
        del params  # rules that pack coordinates need it
        return pytree.tree_map_only(Tensor, lambda x: x[index] if x.dim() else x, state)

    @property
    def device(self) -> torch.device | None:
        """Where its weights are; None for a rule without any, which serves params anywhere."""
        weight = next(itertools.chain(self.parameters(), self.buffers()), None)
        return None if weight is None else weight.device

    def plain(self) -> Rule | None:
        """The same rule without fused kernels, the peer of its speed-ups; None for a rule without a kernel."""
        return None

    def state_header(self) -> dict[str, Any]:
        """What the rule of a checkpoint of states must agree in: plain data."""
        return {"rule": type(self).__name__}

    def export_state(self, tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """What a checkpoint holds of one parameter's state: tensors whose meaning no kernel's layout decides.

        Args:
            tensors: the state of the parameter, by name
            number: its coordinates
        """
        del number
        return dict(tensors)

    def import_state(self, saved: Mapping[str, Any], param: Tensor, name: str) -> dict[str, Tensor]:
        """The state of one parameter from what :meth:`export_state` gave, copied to the dtype and device of now.

        Args:
            saved: the entry of a checkpoint
            param: whose state it is
            name: how messages call the parameter

        Raises:
            ValueError: for an entry that does not fit.
        """
        like = named_state(self.init_state({name: param}))
        return {key: check_saved(saved, key, like[key], name).to(like[key], copy=True) for key in like}

    def described(self) -> str:
        """What the rule is, for its model card."""
        return f"An update rule: {type(self).__name__}({self.extra_repr()})."


@dataclass(frozen=True, eq=False)
class RuleState:
    """The state of a rule that goes tensor by tensor; a pytree.

    With tasks, each tensor in it leads with the task axis, or is [] and the same for all tasks.

    Attributes:
        per_tensor: a dict of named tensors for each tensor of params, in the order of the tree
        shared: what belongs to no single tensor, by name
        tasks: whether params have a task axis
    """

    per_tensor: tuple[dict[str, Tensor], ...]
    shared: dict[str, Tensor]
    tasks: bool


def _rebuilt(children: Iterable[Any], tasks: bool) -> RuleState:
    per_tensor, shared = children
    return RuleState(per_tensor, shared, tasks)


pytree.register_pytree_node(
    RuleState,
    lambda state: ([state.per_tensor, state.shared], state.tasks),
    _rebuilt,
    serialized_type_name="metakern.rules.RuleState",
)


def named_state(state: State) -> dict[str, Tensor]:
    """The tensors of one parameter's state by name; those of a state that is no RuleState are numbered."""
    if isinstance(state, RuleState):
        (tensors,) = state.per_tensor
        return tensors
    return {f"state.{index}": x for index, x in enumerate(pytree.tree_leaves(state))}


def detached(tree: _Tree) -> _Tree:
    """The same tree of params or state, cut off from the graph."""
    cut: _Tree = pytree.tree_map_only(Tensor, Tensor.detach, tree)
    return cut


def moved(tree: _Tree, *args: Any, **kwargs: Any) -> _Tree:
    """The same tree with ``x.to(*args, **kwargs)`` of every floating tensor; of the others the dtype stays."""

    def move(x: Tensor) -> Tensor:
        to = x.to(*args, **kwargs)
        return to if x.is_floating_point() else to.to(x.dtype)

    there: _Tree = pytree.tree_map_only(Tensor, move, tree)
    return there


def named_leaves(params: Params) -> dict[str, Tensor]:
    """The tensors of params by name: the keys on the way to each, joined by dots; "params" for a single tensor."""
    if type(params) is dict and all(isinstance(p, Tensor) for p in params.values()):
        return params
    if isinstance(params, Tensor):
        return {"params": params}
    paths, _ = pytree.tree_flatten_with_path(params)
    return {".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): p for path, p in paths}


def matched_leaves(params: Params, grads: Params) -> tuple[list[Tensor], list[Tensor], Rebuild]:
    """The tensors of params and those of grads, and what makes a tree of this structure of other tensors.

    Raises:
        ValueError: for structures, shapes or devices that differ
        TypeError: for leaves that are no tensors
    """
    leaves, rebuild = flat_params(params)
    grad_leaves = aligned_leaves(params, grads)
    if grad_leaves is None:
        grad_leaves, grad_structure = pytree.tree_flatten(grads)
        structure = pytree.tree_structure(params)
        if structure != grad_structure:
            raise ValueError(f"grads must have the structure of params, {structure}, got {grad_structure}")
    for index, (leaf, grad) in enumerate(zip(leaves, grad_leaves, strict=True)):
        check_leaf(leaf, "params", index)
        check_leaf(grad, "grads", index)
        if leaf.device != leaves[0].device or grad.device != leaves[0].device:
            raise ValueError(
                f"params and grads must be on one device, {leaves[0].device}: leaf {index} has {leaf.device} and "
                f"{grad.device}"
            )
        if leaf.shape != grad.shape:
            raise ValueError(
                f"grads must have the shapes of params: leaf {index} has {list(grad.shape)}, "
                f"expected {list(leaf.shape)}"
            )
    return leaves, grad_leaves, rebuild


def tensor_leaves(params: Params, *, tasks: bool = False) -> list[Tensor]:
    """The tensors of params; TypeError for leaves that are none, ValueError where they lack a common task axis."""
    leaves = pytree.tree_leaves(params)
    for index, leaf in enumerate(leaves):
        check_leaf(leaf, "params", index)
        if tasks and (not leaf.dim() or leaf.shape[0] != leaves[0].shape[0]):
            shapes = [list(p.shape) for p in leaves]
            raise ValueError(f"params must have one leading axis of tasks for tasks=True, got shapes {shapes}")
    return leaves


def check_loss(rule: Rule, loss: Tensor | None) -> Tensor | None:
    """The losses if the rule needs them; ValueError where it does and there are none."""
    if not rule.needs_loss:
        return None
    if loss is None:
        raise ValueError(f"loss must be given to {type(rule).__name__}: a tensor [T] with a task axis, [] without")
    return loss


def check_saved(saved: Mapping[str, Any], key: str, like: Tensor, name: str) -> Tensor:
    """The tensor of a checkpoint's entry; ValueError unless it has the shape and kind of another."""
    value = saved.get(key)
    kinds = (torch.float32, torch.float64, torch.bfloat16) if like.is_floating_point() else (like.dtype,)
    if not isinstance(value, Tensor) or value.dtype not in kinds or value.shape != like.shape or value.is_sparse:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        wanted = ", ".join(str(kind) for kind in kinds)
        raise ValueError(f"{key} of {name} must be dense, {wanted}, {list(like.shape)}, got {got}")
    return value.detach()


def check_leaf(leaf: Any, name: str, index: int) -> None:
    """Raise TypeError unless a leaf of a tree is a tensor."""
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{name} must hold tensors only, got {type(leaf).__name__} as leaf {index}")


def flatten(leaves: Sequence[Tensor]) -> Tensor:
    """All coordinates in one tensor [N]; mixed dtypes are promoted."""
    return leaves[0].reshape(-1) if len(leaves) == 1 else torch.cat([leaf.reshape(-1) for leaf in leaves])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors whose coordinates are [N], in the shapes and dtypes of others."""
    pieces = [flat] if len(like) == 1 else flat.split([leaf.numel() for leaf in like])
    return [piece.view(p.shape).to(p.dtype) for piece, p in zip(pieces, like, strict=True)]


def loss_of_coordinates(loss: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """The losses [T] or [] as [N], each at the coordinates of its task."""
    return flatten([(loss.view(-1, *[1] * (p.dim() - 1)) if loss.dim() else loss).expand(p.shape) for p in leaves])


def coordinates_of_tasks(index: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Where the coordinates of some tasks stand among all N, as :func:`flatten` orders them: integers [N']."""
    places = torch.arange(sum(p.numel() for p in leaves), device=index.device)
    pieces = places.split([p.numel() for p in leaves])
    return flatten([piece.view(p.shape)[index] for piece, p in zip(pieces, leaves, strict=True)])
