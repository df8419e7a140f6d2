"""What takes an inner step: gradient descent with rates that are given, or a rule.

Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

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
    """What the inner loop asks of whatever takes its steps."""

    @property
    def weights(self) -> Any:
        """Pytree of the tensors that a meta-gradient may be asked for besides params and data."""
        ...

    def init_state(self, params: Any) -> Any:
        """The state before the first step, a pytree of tensors."""
        ...

    def step(self, weights: Any, params: Any, grads: Any, state: Any, losses: Tensor, step: int) -> tuple[Any, Any]:
        """New params and state after inner step ``step``, with ``weights`` in place of its own unless they are None."""
        ...

    def check_recomputable(self, params: Any, state: Any) -> None:
        """Raise RuntimeError where steps that are computed again would lose a meta-gradient."""
        ...

    def lock(self) -> AbstractContextManager[Any]:
        """Held while steps are taken, by the backward, too."""
        ...


class Descent:
    """θ' = θ − α ⊙ g for params by name, in one launch.

    Args:
        rates: α
        clip_norm: largest norm of a task's gradient
    """

    def __init__(self, rates: LearningRates, clip_norm: float | None) -> None:
        self.rates, self.clip_norm = rates, clip_norm

    @property
    def weights(self) -> Any:
        """α."""
        return self.rates.values

    def init_state(self, params: Any) -> Any:
        """It has none."""
        return ()

    def step(self, weights: Any, params: Any, grads: Any, state: Any, losses: Tensor, step: int) -> tuple[Any, Any]:
        """See :func:`metakern.ops.inner_update`."""
        # torch.compile fuses the formula with what stands around it, and torch.func sees through it.
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
        """It depends on α alone."""

    def lock(self) -> AbstractContextManager[Any]:
        """Nothing is replaced for a moment."""
        return nullcontext()


class RuleUpdate:
    """Steps of a rule for T tasks side by side.

    Args:
        rule: see :class:`metakern.rules.Rule`. A module with ``init_state(params)`` and ``forward(params, grads,
            state)`` alone serves, too: it is told neither of the task axis nor the losses.
        clip_norm: largest norm of a task's gradient

    Raises:
        TypeError: for anything else
    """

    def __init__(self, rule: Any, clip_norm: float | None = None) -> None:
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

    @property
    def weights(self) -> dict[str, Tensor]:
        """The rule's parameters by name."""
        return dict(self.rule.named_parameters())

    def init_state(self, params: Any) -> Any:
        """The rule's, for params with a task axis; a tuple of states where every group of a tuple has its own.

        Params that are a tuple are of groups of tasks, whose tensors differ. A rule that treats all coordinates alike
        takes them together, in one launch; any other has to be told which tensors share their tasks.
        """
        if self._goes_by_group(params):
            return tuple(self.init_state(group) for group in params)
        tells = self._tells_tasks and not isinstance(params, tuple)
        return self.rule.init_state(params, **({"tasks": True} if tells else {}))

    def step(self, weights: Any, params: Any, grads: Any, state: Any, losses: Tensor, step: int) -> tuple[Any, Any]:
        """One step of the rule, which counts by itself."""
        if not self._goes_by_group(params):
            if self.clip_norm is not None:
                grads = clipped(grads, self.clip_norm)
            return self._call(weights, params, grads, state, losses)
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
        """Raise where the rule holds a tensor that requires a gradient and is none of its parameters."""
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
        """That of the rule, whose parameters are replaced while the backward computes steps again."""
        return exclusive(self.rule)


def clipped(grads: Any, clip_norm: float) -> Any:
    """Gradients, a pytree of tensors [T, *shape], with every task's norm over all of them at most ``clip_norm``."""
    if type(grads) is tuple:  # groups of tasks
        return tuple(clipped(group, clip_norm) for group in grads)
    leaves, structure = pytree.tree_flatten(grads)
    coefficients = reference.clip_coefficients(leaves, clip_norm)
    return pytree.tree_unflatten([reference.scaled(coefficients, g) for g in leaves], structure)


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of this name."""
    if torch.compiler.is_compiling():  # which cannot look at signatures
        return True
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
