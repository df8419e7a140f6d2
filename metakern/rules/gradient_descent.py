"""Gradient descent with fixed or learned rates: SGD, Meta-SGD, LSLR.

Finn et al. 2017, arXiv 1703.03400, equation 1; Meta-SGD: Li et al. 2017, arXiv 1707.09835; LSLR: Antoniou et al. 2019,
arXiv 1810.09502. Axis legend: T tasks, K inner steps, ``*shape`` the shape of one parameter tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from metakern.core.checks import check_clip_norm, check_count
from metakern.core.torch_private import pytree
from metakern.core.transforms import is_transformed_or_dual
from metakern.ops.inner_update import inner_update, reference
from metakern.rules.pretrained import PretrainedRule
from metakern.rules.protocol import Params, RuleState, matched_leaves, named_leaves, tensor_leaves
from metakern.rules.rates import LearningRates, learning_rates, rates_by_name, real_dtype


class GradientDescent(PretrainedRule):
    """θ' = θ − α ⊙ g, the inner step of MAML.

    Every ``nn.Parameter`` in α is learned; other tensors are buffers, through which gradients flow to their sources.
    When a saved rule is loaded, all its tensors are learned.

    Args:
        lr: α: a number or a tensor of one element; or one entry per parameter tensor, in a dict by name or a list in
            order: a number or [], [*shape] (Meta-SGD), and with ``steps`` also [K] (LSLR) or [K, *shape]. Dict keys
            may be glob patterns; see :func:`metakern.adapt`.
        steps: K, for rates that differ by step; a rule with such rates takes at most K steps. All tasks must have
            taken equally many steps.
        clip_norm: largest norm of a task's gradient, over all its tensors; a longer one is scaled down to it. A NaN
            norm makes the whole task NaN.

    Raises:
        TypeError, ValueError: for arguments that do not fit.

    Example:
        >>> rule = GradientDescent(0.1, clip_norm=10.0)
        >>> learned = GradientDescent.lslr(net.named_parameters(), steps=5, lr=0.01)
    """

    title = "Gradient descent"
    takes_copies = True

    def __init__(self, lr: Any = 0.01, *, steps: int | None = None, clip_norm: float | None = None) -> None:
        super().__init__()
        self.steps = None if steps is None else check_count("steps", steps)
        self.clip_norm = check_clip_norm(clip_norm)
        self._names: list[str] = []  # in the order given: the first matching glob pattern wins
        self._numbers: dict[str, float] = {}
        self._by_order = isinstance(lr, (list, tuple, nn.ParameterList))
        self.rates = nn.Module()
        if self._by_order:
            lr = {str(index): rate for index, rate in enumerate(lr)}
        if isinstance(lr, (Mapping, nn.ParameterDict)):
            self.lr: Any = None
            self._names = list(lr)
            for name, rate in lr.items():
                if isinstance(rate, Tensor):
                    _register(self.rates, name.replace(".", "/"), rate)
                else:
                    learning_rates(rate, {}, 0)  # raises for invalid rates
                    self._numbers[name] = float(rate)
        else:
            value = learning_rates(lr, {}, 0).values
            if isinstance(value, Tensor):
                _register(self, "lr", lr if isinstance(lr, nn.Parameter) else value)
            else:
                self.lr = value

    @classmethod
    def meta_sgd(cls, parameters: Any, lr: float = 0.01, *, clip_norm: float | None = None) -> Self:
        """A learned rate for every parameter of a model.

        Args:
            parameters: a dict by name, or ``named_parameters()``; [*shape] each
            lr: initial value of all rates
            clip_norm: see the constructor
        """
        return cls({name: _rate(p, p.shape, lr) for name, p in dict(parameters).items()}, clip_norm=clip_norm)

    @classmethod
    def lslr(cls, parameters: Any, steps: int, lr: float = 0.01, *, clip_norm: float | None = None) -> Self:
        """A learned rate per parameter tensor and step (K = ``steps``); other arguments as for :meth:`meta_sgd`."""
        steps = check_count("steps", steps)
        rates = {name: _rate(p, (steps,), lr) for name, p in dict(parameters).items()}
        return cls(rates, steps=steps, clip_norm=clip_norm)

    def learning_rates(self, params: Mapping[str, Tensor]) -> LearningRates:
        """α for one task's params, [*shape] each by name. With ``clip_norm``, this is all that a step needs."""
        return self._learning_rates(params, False)

    def init_state(self, params: Params, *, tasks: bool = False) -> RuleState:
        """A step count if the rates depend on the step, else an empty state."""
        leaves = tensor_leaves(params, tasks=tasks)
        counts = self.steps is not None and self.lr is None
        # Always on the CPU: Python reads it in every step.
        shared = {"count": torch.zeros((), dtype=torch.int64)} if counts else {}
        return RuleState(({},) * len(leaves), shared, tasks)

    def forward(
        self, params: Params, grads: Params, state: RuleState, *, loss: Tensor | None = None
    ) -> tuple[Params, RuleState]:
        """One step; see :meth:`metakern.rules.Rule.forward`."""
        del loss
        return self._step(params, grads, state, 1.0)

    @torch.no_grad()
    def step_(
        self, params: Params, grads: Params, state: RuleState, lr: float = 1.0, *, loss: Tensor | None = None
    ) -> None:
        """One step in place, without a graph, α times ``lr``."""
        del loss
        new, new_state = self._step(params, grads, state, lr)
        for old, p in zip(pytree.tree_leaves(params), pytree.tree_leaves(new), strict=True):
            old.copy_(p)
        for name, count in new_state.shared.items():
            state.shared[name].copy_(count)

    def _step(self, params: Params, grads: Params, state: RuleState, factor: float) -> tuple[Params, RuleState]:
        leaves, grad_leaves, rebuild = matched_leaves(params, grads)
        if not leaves:
            return params, state
        if self.copies is not None:
            return rebuild(self._moved_copies(params, leaves, grad_leaves)), state
        rates = self._learning_rates(params, state.tasks)
        values: Any = rates.values
        if factor != 1:
            values = [factor * rate for rate in values] if isinstance(values, list) else factor * values
        # torch.compile can fuse the plain formula and torch.func transform it; no kernel takes complex tensors.
        plain = is_transformed_or_dual() or any(p.is_complex() for p in leaves)
        count, step = state.shared.get("count"), None
        if rates.per_step and count is not None:
            if plain:
                values = [rate.index_select(0, count.to(rate.device).view(1)).squeeze(0) for rate in values]
            else:
                step = int(count)
        alone = self.clip_norm is not None and not state.tasks
        if alone:  # norms are taken per entry of the first axis
            leaves, grad_leaves = ([x.unsqueeze(0) for x in xs] for xs in (leaves, grad_leaves))
        update = reference.inner_update if plain else inner_update
        new: Sequence[Tensor] = update(leaves, grad_leaves, values, step=step, clip_norm=self.clip_norm)
        if alone:
            new = [p.squeeze(0) for p in new]
        shared = state.shared if count is None else {"count": count + 1}
        return rebuild(new), RuleState(state.per_tensor, shared, state.tasks)

    def can_take_copies(self) -> bool:
        """Whether tasks may have rates of their own: not where rates differ by step, as all tasks share one count."""
        return super().can_take_copies() and self.steps is None

    def _moved_copies(self, params: Params, leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """New params of tasks whose rates are their own."""
        if self.lr is not None:
            rates = [self.lr] * len(leaves)
        else:
            held = self.rates._parameters | self.rates._buffers
            named: Any = {n: self._numbers[n] if n in self._numbers else held[n.replace(".", "/")] for n in self._names}
            names = list(named_leaves(params))
            rates = list((named if self._by_order else rates_by_name(named, names, strict=False)).values())
        shaped = [_per_copy(rate, p) for rate, p in zip(rates, leaves, strict=True)]
        return reference.inner_update(leaves, grads, shaped, clip_norm=self.clip_norm)

    def _learning_rates(self, params: Params, tasks: bool) -> LearningRates:
        """α for these params."""
        if self.lr is not None:
            return LearningRates(self.lr.reshape(()) if isinstance(self.lr, Tensor) else self.lr, False)
        leaves = named_leaves(params)
        if tasks:
            leaves = {name: p[0] if len(p) else p.new_empty(p.shape[1:]) for name, p in leaves.items()}
        held = self.rates._parameters | self.rates._buffers
        rates: Any = {n: self._numbers[n] if n in self._numbers else held[n.replace(".", "/")] for n in self._names}
        rates = list(rates.values()) if self._by_order else rates_by_name(rates, list(leaves), strict=False)
        return learning_rates(rates, leaves, self.steps)

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """The options in config.json; tensors are saved as weights."""
        return {"lr": float | None, "steps": int | None, "clip_norm": float | None}

    def saved_options(self) -> dict[str, Any]:
        """The options for config.json; ValueError for numbers by name, which cannot be saved."""
        if self._numbers:
            raise ValueError(f"lr must be a number or hold tensors to be saved, got numbers for {[*self._numbers]}")
        return super().saved_options()

    @classmethod
    def from_saved(cls, options: dict[str, Any], weights: Mapping[str, Tensor]) -> Self:
        """A rule whose rates have the shapes of the saved weights."""
        if options["lr"] is not None:
            return cls(**options)
        named = {name.partition("rates.")[2].replace("/", "."): nn.Parameter(w.clone()) for name, w in weights.items()}
        lr: Any = named
        if "lr" in weights:
            lr = nn.Parameter(weights["lr"].clone())
        elif all(name.isdigit() for name in named):
            lr = [named[str(index)] for index in range(len(named))]
        return cls(**options | {"lr": lr})

    def extra_repr(self) -> str:
        """The options."""
        lr = self.lr if self.lr is not None else f"<{len(self._names)} by name>"
        return f"lr={lr.item() if isinstance(lr, Tensor) else lr}, steps={self.steps}, clip_norm={self.clip_norm}"


def _rate(p: Tensor, shape: Sequence[int], lr: float) -> nn.Parameter:
    return nn.Parameter(torch.full(tuple(shape), float(lr), dtype=real_dtype(p), device=p.device))


def _per_copy(rate: Any, like: Tensor) -> Any:
    """A rate, in copies [T, *shape] if it is a parameter, so that it broadcasts against ``like`` [T, *shape]."""
    if not isinstance(rate, nn.Parameter):
        return rate.reshape(()) if isinstance(rate, Tensor) and rate.numel() == 1 else rate
    return rate if rate.shape == like.shape else rate.reshape(-1, *[1] * (like.dim() - 1))


def _register(module: nn.Module, name: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)
