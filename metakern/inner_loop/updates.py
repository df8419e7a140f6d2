"""Updates of the inner loop: gradient descent with given rates, or an update rule.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metakern.core.checksum import digest
from metakern.core.exclusive import exclusive
from metakern.core.random_state import kept_random_state
from metakern.core.task_params import num_tasks
from metakern.core.torch_private import pytree
from metakern.core.transforms import is_transformed
from metakern.ops.inner_update import inner_update, reference
from metakern.rules.coordinatewise import CoordinatewiseRule
from metakern.rules.protocol import Rule, detached
from metakern.rules.rates import LearningRates, real_dtype


class Update(Protocol):
    """The inner loop's interface to an update rule."""

    @property
    def weights(self) -> Any:
        """Pytree of the update's own tensors that may receive meta-gradients."""
        ...

    def init_state(self, params: Any) -> Any:
        """The state before the first step, a pytree of tensors."""
        ...

    def points(self, params: Any, state: Any) -> Any:
        """Where the next losses and gradients are to be taken, structured like ``params``."""
        ...

    def step(self, weights: Any, params: Any, grads: Any, state: Any, losses: Tensor, step: int) -> tuple[Any, Any]:
        """New params and state after inner step ``step``, with ``weights`` in place of its own unless they are None."""
        ...

    def check_recomputable(self, params: Any, state: Any) -> None:
        """Raise RuntimeError if recomputed steps would lose a meta-gradient."""
        ...

    def lock(self) -> AbstractContextManager[Any]:
        """Lock to hold while steps are taken, also by the backward."""
        ...


class Descent:
    """θ' = θ − α ⊙ g for params by name, in one launch.

    Args:
        rates: α
        clip_norm: maximum norm of a task's gradient
    """

    def __init__(self, rates: LearningRates, clip_norm: float | None) -> None:
        self.rates, self.clip_norm = rates, clip_norm

    @property
    def weights(self) -> Any:
        """α."""
        return self.rates.values

    def init_state(self, params: Any) -> Any:
        """Gradient descent has no state."""
        return ()

    def points(self, params: Any, state: Any) -> Any:
        """The params themselves."""
        return params

    def step(self, weights: Any, params: Any, grads: Any, state: Any, losses: Tensor, step: int) -> tuple[Any, Any]:
        """See :func:`metakern.ops.inner_update`."""
        # torch.compile fuses the formula with the surrounding code, and torch.func can transform it.
        plain = is_transformed() or any(p.is_complex() for p in params.values())
        update: Callable[..., list[Tensor]] = reference.inner_update if plain else inner_update
        updated = update(
            list(params.values()),
            [grads[name] for name in params],
            self.rates.values if weights is None else weights,
            step=step if self.rates.per_step else None,
            clip_norm=self.clip_norm,
        )
        return dict(zip(params, updated, strict=True)), state

    def check_recomputable(self, params: Any, state: Any) -> None:
        """Never raises: the step depends on no other tensors than α."""

    def lock(self) -> AbstractContextManager[Any]:
        """No lock is needed, as no tensors are replaced temporarily."""
        return nullcontext()


class RuleUpdate:
    """Steps of an update rule for T tasks side by side.

    Args:
        rule: see :class:`metakern.rules.Rule`. A module with just ``init_state(params)`` and ``forward(params, grads,
            state)`` works, too: it receives neither ``tasks`` nor the losses.
        clip_norm: maximum norm of a task's gradient
        redraws: whether a rule that draws its initial state draws other numbers for every task, by its initial params;
            for meta-training, which would else fit the rule to one draw

    Raises:
        TypeError: for anything else
    """

    def __init__(self, rule: Any, clip_norm: float | None = None, *, redraws: bool = False) -> None:
        if not isinstance(rule, nn.Module) or not hasattr(rule, "init_state"):
            raise TypeError(
                "rule must be a module with init_state(params) and forward(params, grads, state), as "
                f"metakern.rules.Rule describes it, got {type(rule).__name__}"
            )
        protocol: Any = rule
        self.rule = protocol
        self.clip_norm = clip_norm
        self._tells_tasks = _takes(protocol.init_state, "tasks")
        self._tells_loss = _takes(protocol.forward, "loss")
        self._moves_gradients = isinstance(rule, Rule) and rule.moves_gradients
        self._redraws = redraws and isinstance(rule, Rule) and rule.draws_state

    @property
    def weights(self) -> dict[str, Tensor]:
        """The rule's parameters by name."""
        return dict(self.rule.named_parameters())

    def init_state(self, params: Any) -> Any:
        """The rule's initial state for params with a task axis; a tuple of states if it steps group by group.

        A tuple of params holds groups of tasks with different tensors. A coordinatewise rule takes all groups together,
        in one launch; any other rule takes one group at a time, as it must know which tensors share their tasks.
        """
        if self._goes_by_group(params):
            return tuple(self.init_state(group) for group in params)
        tells = self._tells_tasks and not isinstance(params, tuple)
        if self._redraws and tells and num_tasks(params):
            return self._redrawn_state(params)
        return self.rule.init_state(params, **({"tasks": True} if tells else {}))

    def _redrawn_state(self, params: Any) -> Any:
        """The initial state with numbers of every task's own, which depend on the rule's seed and the task's params.

        So they are the same for a task alone, for both of an antithetic pair, and in a resumed run.
        """
        leaves, seed = pytree.tree_leaves(params), self.rule.seed
        seeds = []
        for task in range(num_tasks(params)):
            named = {f"{seed}/{index}": p[task : task + 1].contiguous() for index, p in enumerate(leaves)}
            seeds.append(int(digest(named)[:15], 16))
        return self.rule.init_state(params, tasks=True, seeds=seeds)

    def points(self, params: Any, state: Any) -> Any:
        """The params themselves, unless the rule chooses other points."""
        if not self._moves_gradients:
            return params
        if self._goes_by_group(params):
            return tuple(self.rule.gradient_points(*of_group) for of_group in zip(params, state, strict=True))
        return self.rule.gradient_points(params, state)

    def step(self, weights: Any, params: Any, grads: Any, state: Any, losses: Tensor, step: int) -> tuple[Any, Any]:
        """One step of the rule; ``step`` is unused, as rules count steps themselves."""
        if not self._goes_by_group(params):
            if self.clip_norm is not None:
                grads = clipped(grads, self.clip_norm)
            return self._call(weights, params, grads, state, losses)
        if weights is None and self.clip_norm is None and not any(type(group) is tuple for group in params):
            new_params, new_states = self.rule.step_groups(params, grads, state, loss=losses)
            return new_params, new_states
        parts = losses.split([num_tasks(group) for group in params])
        of_groups = zip(params, grads, state, parts, strict=True)
        stepped = [self.step(weights, *of_group, step) for of_group in of_groups]
        return tuple(new for new, _ in stepped), tuple(new_state for _, new_state in stepped)

    def _call(self, weights: Any, params: Any, grads: Any, state: Any, losses: Tensor) -> tuple[Any, Any]:
        options = {"loss": losses} if self._tells_loss else {}
        if weights is None:
            new, new_state = self.rule(params, grads, state, **options)
        else:
            new, new_state = functional_call(self.rule, weights, (params, grads, state), options)
        return new, new_state

    def _goes_by_group(self, params: Any) -> bool:
        if not isinstance(params, tuple) or not isinstance(self.rule, Rule):
            return False
        return self.rule.needs_loss or not isinstance(self.rule, CoordinatewiseRule)

    def check_recomputable(self, params: Any, state: Any) -> None:
        """Raise if the rule holds a tensor that requires a gradient but is not one of its parameters."""
        params, state, weights = detached((params, state, self.weights))
        first = pytree.tree_leaves(params)[0]
        losses = torch.zeros(num_tasks(params), dtype=real_dtype(first), device=first.device)
        with torch.enable_grad(), kept_random_state(first.device):
            found = self.step(weights, params, pytree.tree_map(torch.zeros_like, params), state, losses, 0)
        if any(isinstance(x, Tensor) and x.requires_grad for x in pytree.tree_leaves(found)):
            raise RuntimeError(
                "checkpoint_every recomputes from model, data and the rule's parameters, but the rule holds another "
                "tensor that requires a gradient, which would be lost; register it as a parameter of the rule, or "
                "leave checkpoint_every out"
            )

    def lock(self) -> AbstractContextManager[Any]:
        """The rule's lock, as the backward replaces its parameters while it recomputes steps."""
        return exclusive(self.rule)


def learned_start(rule: Any, params: Mapping[str, Tensor], way_out: str) -> dict[str, Tensor] | None:
    """The initial parameters that a rule learns, [*shape] each by name; None if it learns none.

    Args:
        rule: the rule
        params: the parameters that it adapts, [*shape] each
        way_out: advice at the end of the message

    Raises:
        ValueError: for a rule that learns a start for other parameters
    """
    start = rule.initialisation() if hasattr(rule, "initialisation") else None
    if start is None:
        return None
    shapes = {name: list(p.shape) for name, p in params.items()}
    got = {name: list(p.shape) for name, p in start.items()}
    if got != shapes:
        raise ValueError(
            f"rule must learn initial values for the adapted parameters, {shapes}, but its initialisation() has {got}: "
            f"{way_out}"
        )
    return {name: start[name] for name in params}


def clipped(grads: Any, clip_norm: float) -> Any:
    """Clip gradients, a pytree of tensors [T, *shape], to norm ``clip_norm`` per task over all tensors."""
    if type(grads) is tuple:  # groups of tasks
        return tuple(clipped(group, clip_norm) for group in grads)
    leaves, structure = pytree.tree_flatten(grads)
    coefficients = reference.clip_coefficients(leaves, clip_norm)
    return pytree.tree_unflatten([reference.scaled(coefficients, g) for g in leaves], structure)


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes an argument of this name."""
    if torch.compiler.is_compiling():  # torch.compile cannot inspect signatures
        return True
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
