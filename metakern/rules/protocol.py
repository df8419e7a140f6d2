"""The update rule protocol: modules that map parameters, gradients and a state to new parameters and a new state.

A rule is functional: it changes none of its arguments and keeps nothing between calls, so autograd works through any
number of steps and one rule can serve many problems at once. Its own weights are meta-learned.

Axis legend: T tasks, N coordinates (scalar parameters of all tasks), ``*shape`` the shape of one parameter tensor.
"""

from __future__ import annotations

import copy
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

#: A rule's state between steps: any pytree of tensors. Its structure is private to the rule.
State = Any

_Tree = TypeVar("_Tree")


class Rule(nn.Module):
    """Base class of update rules; a rule implements :meth:`init_state` and :meth:`forward`.

    Params are a dict of named tensors, or any other pytree of tensors, [*shape] each, or [T, *shape] each for T tasks.
    ``init_state(params, tasks=True)`` declares the task axis, and the state records it for the following steps.
    Coordinatewise rules do not depend on it.

    A rule that counts steps keeps the count in its state, as an integer tensor: [] or, where tasks may have taken
    different numbers of steps, [T].

    Attributes:
        needs_loss: whether ``forward`` needs the argument ``loss``
        draws_state: whether ``init_state`` draws numbers, which an attribute ``seed`` decides, or its argument
            ``seeds``, one per task
        takes_copies: whether ``forward`` takes weights of every task's own, see :func:`with_copies`. Not inherited: a
            subclass with steps of its own says so itself.
        copies: the number of copies of the weights in a rule made by :func:`with_copies`, else None
        horizon: steps that the rule was meta-trained for, or None
        trained_on: description of the meta-training tasks, or None
        title: name in figures and tables
        advice_for_other_networks: how to use the rule on other networks, for its model card
        advice_beyond_horizon: advice in LearnedOptimizer's warning after ``horizon`` steps

    Example:
        >>> class HalfStep(Rule):
        ...     def init_state(self, params, *, tasks=False):
        ...         return {}
        ...     def forward(self, params, grads, state, *, loss=None):
        ...         return {name: p - 0.5 * grads[name] for name, p in params.items()}, state
        >>> losses = meta_loss(
        ...     net, (support_x, support_y), (query_x, query_y), loss=F.cross_entropy, steps=2, rule=HalfStep()
        ... )
    """

    needs_loss: ClassVar[bool] = False
    draws_state: ClassVar[bool] = False
    takes_copies: ClassVar[bool] = False
    title: ClassVar[str] = "Rule"
    advice_for_other_networks: ClassVar[str] = "tune `lr` as for any optimizer, and let it decay"
    advice_beyond_horizon: ClassVar[str] = "let a scheduler decay lr"

    horizon: int | None = None
    trained_on: str | None = None
    copies: int | None = None

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
            loss: the losses whose gradients ``grads`` are, [T] with a task axis and [] without; None raises a
                ValueError if the rule ``needs_loss``

        Returns:
            new params in the structure of ``params``, new state
        """
        raise NotImplementedError

    def step_groups(
        self, params: Sequence[Params], grads: Sequence[Params], states: Sequence[State], *, loss: Tensor | None = None
    ) -> tuple[tuple[Params, ...], tuple[State, ...]]:
        """One step of several groups of tasks, whose tensors differ; by default :meth:`forward` for one after another.

        A rule that overrides it and ``takes_copies`` takes them here, too: a copy for each task of all groups, which
        have coordinates of one dtype on one device.

        Args:
            params: of every group, with the task axis
            grads: likewise
            states: likewise
            loss: [T] of the tasks of all groups, group after group, or None

        Returns:
            new params and new states of every group
        """
        counts = [tensor_leaves(group, tasks=True)[0].shape[0] for group in params]
        parts = [None] * len(counts) if loss is None else loss.split(counts)
        stepped = [self(*of, loss=part) for *of, part in zip(params, grads, states, parts, strict=True)]
        return tuple(new for new, _ in stepped), tuple(new_state for _, new_state in stepped)

    def initialisation(self) -> Mapping[str, Tensor] | None:
        """The learned initial parameters, [*shape] each by name; None if the rule learns none."""
        return None

    def gradient_points(self, params: Params, state: State) -> Params:
        """Where the gradients of the next step are to be taken; by default at the params themselves.

        A rule that overrides it sets ``moves_gradients``.

        Args:
            params: as for :meth:`forward`
            state: the state before that step

        Returns:
            points in the structure and shapes of ``params``
        """
        del state
        return params

    @property
    def moves_gradients(self) -> bool:
        """Whether :meth:`gradient_points` may differ from the params."""
        return False

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
            loss: the losses whose gradients ``grads`` are
        """
        new, new_state = self(params, grads, state, loss=loss)
        for old, p in zip(pytree.tree_leaves(params), pytree.tree_leaves(new), strict=True):
            old.copy_(p if lr == 1 else torch.lerp(old, p, lr))
        for old, x in zip(pytree.tree_leaves(state), pytree.tree_leaves(new_state), strict=True):
            old.copy_(x)

    def can_take_copies(self) -> bool:
        """Whether :func:`with_copies` may be called for this rule."""
        return bool(vars(type(self)).get("takes_copies", False))

    def steps_groups_at_once(self) -> bool:
        """Whether :meth:`step_groups` is the rule's own."""
        return type(self).step_groups is not Rule.step_groups

    def select_tasks(self, state: State, index: Tensor, params: Params) -> State:
        """The state of a subset of tasks, as if the rule had stepped those alone.

        Args:
            state: of T tasks
            index: integers [T'], or bool [T]
            params: the state's parameters, [T, *shape] each
        """
        del params  # rules that pack coordinates need it
        return pytree.tree_map_only(Tensor, lambda x: x[index] if x.dim() else x, state)

    @property
    def device(self) -> torch.device | None:
        """Device of the weights; None for a rule without weights, which works on any device."""
        weight = next(itertools.chain(self.parameters(), self.buffers()), None)
        return None if weight is None else weight.device

    def plain(self) -> Rule | None:
        """The same rule without fused kernels, the baseline for speed-ups; None for a rule without a kernel."""
        return None

    def state_header(self) -> dict[str, Any]:
        """Plain data that must be equal for the rule that saved a checkpoint and the rule that loads it."""
        return {"rule": type(self).__name__}

    def export_state(self, tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """One parameter's state for a checkpoint, independent of any kernel's memory layout.

        Args:
            tensors: the parameter's state, by name
            number: its number of coordinates
        """
        del number
        return dict(tensors)

    def import_state(self, saved: Mapping[str, Any], param: Tensor, name: str) -> dict[str, Tensor]:
        """One parameter's state from the result of :meth:`export_state`, copied to the current dtype and device.

        Args:
            saved: the entry of a checkpoint
            param: the parameter
            name: its name in messages

        Raises:
            ValueError: for an entry that does not fit.
        """
        like = named_state(self.init_state({name: param}))
        return {key: check_saved(saved, key, like[key], name).to(like[key], copy=True) for key in like}

    def described(self) -> str:
        """Description for the model card."""
        return f"An update rule: {type(self).__name__}({self.extra_repr()})."


@dataclass(frozen=True, eq=False)
class RuleState:
    """The state of a tensorwise rule; a pytree.

    With tasks, each tensor in it has the task axis first, or is [] and the same for all tasks.

    Attributes:
        per_tensor: a dict of named tensors for each tensor of params, in the order of the tree
        shared: tensors that belong to no single tensor of params, by name
        tasks: whether params have a task axis

    Example:
        >>> state = Adam().init_state({"weight": torch.zeros(3)})
        >>> isinstance(state, RuleState), state.tasks
        (True, False)
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
    """The tensors of one parameter's state by name; numbered if the state is no RuleState."""
    if isinstance(state, RuleState):
        (tensors,) = state.per_tensor
        return tensors
    return {f"state.{index}": x for index, x in enumerate(pytree.tree_leaves(state))}


def detached(tree: _Tree) -> _Tree:
    """Detach every tensor of a tree of params or state."""
    cut: _Tree = pytree.tree_map_only(Tensor, Tensor.detach, tree)
    return cut


def moved(tree: _Tree, *args: Any, **kwargs: Any) -> _Tree:
    """Apply ``x.to(*args, **kwargs)`` to every tensor of a tree; non-floating tensors keep their dtype."""

    def move(x: Tensor) -> Tensor:
        to = x.to(*args, **kwargs)
        return to if x.is_floating_point() else to.to(x.dtype)

    there: _Tree = pytree.tree_map_only(Tensor, move, tree)
    return there


def named_leaves(params: Params) -> dict[str, Tensor]:
    """The tensors of params by name: their paths of keys, joined by dots; "params" for a single tensor."""
    if type(params) is dict and all(isinstance(p, Tensor) for p in params.values()):
        return params
    if isinstance(params, Tensor):
        return {"params": params}
    paths, _ = pytree.tree_flatten_with_path(params)
    return {".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): p for path, p in paths}


def matched_leaves(params: Params, grads: Params) -> tuple[list[Tensor], list[Tensor], Rebuild]:
    """The tensors of params and of grads, and a function that rebuilds their tree from new tensors.

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
    """The tensors of params; TypeError for other leaves, ValueError if ``tasks`` and they share no task axis."""
    leaves = pytree.tree_leaves(params)
    for index, leaf in enumerate(leaves):
        check_leaf(leaf, "params", index)
        if tasks and (not leaf.dim() or leaf.shape[0] != leaves[0].shape[0]):
            shapes = [list(p.shape) for p in leaves]
            raise ValueError(f"params must have one leading axis of tasks for tasks=True, got shapes {shapes}")
    return leaves


def check_loss(rule: Rule, loss: Tensor | None) -> Tensor | None:
    """``loss`` if the rule needs it, else None; ValueError if it is needed and missing."""
    if not rule.needs_loss:
        return None
    if loss is None:
        raise ValueError(f"loss must be given to {type(rule).__name__}: a tensor [T] with a task axis, [] without")
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss must be a tensor [T] with a task axis, [] without, got {type(loss).__name__}")
    return loss


def check_saved(saved: Mapping[str, Any], key: str, like: Tensor, name: str) -> Tensor:
    """The tensor ``key`` of a checkpoint's entry; ValueError unless it has the shape and kind of dtype of ``like``."""
    value = saved.get(key)
    kinds = (torch.float32, torch.float64, torch.bfloat16) if like.is_floating_point() else (like.dtype,)
    if not isinstance(value, Tensor) or value.dtype not in kinds or value.shape != like.shape or value.is_sparse:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        wanted = ", ".join(str(kind) for kind in kinds)
        raise ValueError(f"{key} of {name} must be dense, {wanted}, {list(like.shape)}, got {got}")
    return value.detach()


def check_training(horizon: Any, trained_on: Any) -> None:
    """Raise TypeError or ValueError for invalid ``horizon`` and ``trained_on`` of a rule."""
    if horizon is not None and (not isinstance(horizon, int) or isinstance(horizon, bool)):
        raise TypeError(f"horizon must be an integer or None, got {horizon!r}")
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    if trained_on is not None and not isinstance(trained_on, str):
        raise TypeError(f"trained_on must be a text or None, got {type(trained_on).__name__}")


def on_reference(rule: _Tree) -> _Tree:
    """A copy of a rule with a ``backend`` that runs by the reference, one launch per operation."""
    plain: Any = copy.deepcopy(rule)
    plain.backend = "reference"
    found: _Tree = plain
    return found


def with_copies(rule: _Tree, copies: int) -> _Tree:
    """A rule that steps ``copies`` tasks, each with weights of its own; for evolution strategies.

    Every parameter of the result is [copies, *shape], equal copies at first; buffers stay as they are. Params and
    gradients of its steps have the leading axis of as many tasks. Coordinatewise rules take them as one tensor
    [copies, P] with a P that is a multiple of their ``unit``. The kernels of such steps have no gradient.

    Args:
        rule: for which ``can_take_copies()`` is true
        copies: number of tasks
    """
    stacked: Any = copy.deepcopy(rule)
    for p in stacked.parameters():
        p.requires_grad_(False)
        p.data = p.data.expand(copies, *p.shape).clone()
    stacked.copies = copies
    found: _Tree = stacked
    return found


def check_integer(name: str, value: Any, least: int, most: int) -> None:
    """Raise TypeError or ValueError unless an option is an integer in [least, most]."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be {least} to {most}, got {value}")


def check_entry(name: str, rule: str, entry: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless tensors of a state have these names and shapes."""
    if entry.keys() != shapes.keys() or any(entry[key].shape != shape for key, shape in shapes.items()):
        got = {key: list(x.shape) for key, x in entry.items()}
        wanted = {key: list(shape) for key, shape in shapes.items()}
        raise ValueError(f"{name} must be of {rule} for these params, with {wanted}, got {got}")


def arithmetic_dtype(leaves: Iterable[Tensor]) -> torch.dtype:
    """The dtype of state and arithmetic: float64 if any tensor is, else float32."""
    return torch.float64 if any(p.dtype == torch.float64 for p in leaves) else torch.float32


def check_leaf(leaf: Any, name: str, index: int) -> None:
    """Raise TypeError unless a leaf is a tensor."""
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{name} must hold tensors only, got {type(leaf).__name__} as leaf {index}")


def flatten(leaves: Sequence[Tensor]) -> Tensor:
    """Flatten and concatenate to one tensor [N]; mixed dtypes are promoted."""
    return leaves[0].reshape(-1) if len(leaves) == 1 else torch.cat([leaf.reshape(-1) for leaf in leaves])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Split [N] into tensors of the shapes and dtypes of ``like``; the inverse of :func:`flatten`."""
    pieces = [flat] if len(like) == 1 else flat.split([leaf.numel() for leaf in like])
    return [piece.view(p.shape).to(p.dtype) for piece, p in zip(pieces, like, strict=True)]


def loss_of_coordinates(loss: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Expand losses [T] or [] to [N], each to the coordinates of its task; ValueError for another number of them."""
    for p in leaves:
        if loss.dim() and (loss.dim() > 1 or not p.dim() or p.shape[0] != loss.shape[0]):
            raise ValueError(
                f"loss must be [] or have one entry per task, the first axis of params, whose shape is "
                f"{list(p.shape)}, got {list(loss.shape)}"
            )
    return flatten([(loss.view(-1, *[1] * (p.dim() - 1)) if loss.dim() else loss).expand(p.shape) for p in leaves])


def coordinates_of_tasks(index: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Indices [N'] of the coordinates of some tasks among all N, in the order of :func:`flatten`."""
    places = torch.arange(sum(p.numel() for p in leaves), device=index.device)
    pieces = places.split([p.numel() for p in leaves])
    return flatten([piece.view(p.shape)[index] for piece, p in zip(pieces, leaves, strict=True)])
