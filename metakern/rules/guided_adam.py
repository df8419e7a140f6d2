"""Guided Adam: Adam's direction, and a small network that steers every tensor's step size.

After ideas of Wichrowska et al. 2017, arXiv 1703.04813 (a network of every tensor and of the whole problem, learning
rates as state), and of You et al. 2020, arXiv 1904.00962 (steps in proportion to a tensor's norm).

Axis legend: T tasks, M tensors of a task, P coordinates of all of them, ``*shape`` the shape of one parameter tensor,
F features, W hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metakern.rules.pretrained import PretrainedRule
from metakern.rules.protocol import (
    Params,
    RuleState,
    arithmetic_dtype,
    check_entry,
    check_integer,
    check_training,
    matched_leaves,
    tensor_leaves,
)

#: Decays of the moving means of g, slower of g, and of g²; the first and the last are where learned ones start.
DECAYS = (0.9, 0.98, 0.99)

#: Tensors of the state that have a parameter tensor's shape.
SHAPED = ("mean", "slow", "square", "delayed", "last")

#: Decays of a tensor's moving means: two of its agreement, then two of its mean g².
TENSOR_DECAYS = (0.8, 0.96, 0.8, 0.98)

#: Number of features of a tensor, and those that the network also sees averaged over the task's tensors.
FEATURES = 22
AVERAGED = 8

#: Outputs: change of ℓ, factor of the step, weights of the slow mean and of the gradient in the direction.
OUTPUTS = 4

#: Largest change of ℓ in a step, largest |ℓ|, largest logarithm of the factor.
RATE, RANGE, FACTOR = 0.1, 6.0, 1.5

#: Parameters' root mean square counts as at least this, and as at least a tenth of that of the whole task.
SMALLEST, SHARE = 1e-3, 0.1

#: Share of the step that is left at and after ``total_steps``.
LAST = 0.01

_EPS = 1e-16

#: Keeps the agreement finite at the first step, where nothing has changed yet; changes may be small.
_TINY = 1e-30


class GuidedAdam(PretrainedRule):
    """Adam, whose step size a small network sets for every tensor from how well gradients agree with its steps.

    v = −exp(b + ℓ + 1.5 tanh o₂) · s · (û₁ + tanh(o₃) û₂ + tanh(o₄) ĝ),
    θ ← θ + a v + (1 − a) c (d + v),  d ← (1 − c) (d + v),  c = min(1, k/t)

    û₁, û₂ and ĝ are moving means of the gradient (learned decay and 0.98, bias-corrected) and the gradient itself, each
    divided by the root of the moving mean of its square (learned decay). s is a geometric mean of the root mean squares
    of the tensor and of all parameters, so steps are relative to the parameters' size. ℓ is a state of the tensor:
    ℓ ← ℓ + 0.1 tanh o₁, |ℓ| ≤ 6.

    A share a of the step v is taken at once. The rest waits in d, of which a share c is released in every step t. If
    a = 0, θ is the running average of the points that steps alone would reach (Defazio et al. 2024, arXiv 2405.15682,
    average likewise), over ever longer times: noise of the gradients averages out, without a known end of training.

    The outputs o come from a network with one hidden layer of tanh units and direct connections, shared by all tensors.
    Its features are of a tensor: agreement of a gradient with the last change of θ, sizes of the means, growth of the
    gradient, size of the tensor and of its values, ℓ, time; and means of some of them over the task's tensors. None
    depends on the scale of the loss, nor of the parameters.

    The direction of every coordinate is bounded, and so is a step's size. The state holds 20 bytes a coordinate
    (float32) and 6 numbers a tensor.

    Args:
        hidden_size: W, 0 to 256; 0: direct connections alone.
        total_steps: steps that the training will take, if known: the steps then also shrink along a half cosine, to 1 %
            at the end and from there on.
        horizon: steps that the rule was meta-trained for; only used by LearnedOptimizer, which warns beyond it.
        trained_on: description of the meta-training tasks, for the model card and that warning.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Example:
        >>> rule = GuidedAdam()
        >>> params = {"weight": torch.randn(10, 3), "bias": torch.zeros(10)}
        >>> state = rule.init_state(params)
        >>> params, state = rule(params, {name: 2 * p for name, p in params.items()}, state)
    """

    title: ClassVar[str] = "Guided Adam"
    takes_copies: ClassVar[bool] = True
    optional_options: ClassVar[tuple[str, ...]] = ("total_steps", *PretrainedRule.optional_options)

    def __init__(
        self,
        hidden_size: int = 16,
        *,
        total_steps: int | None = None,
        horizon: int | None = None,
        trained_on: str | None = None,
    ) -> None:
        super().__init__()
        check_integer("hidden_size", hidden_size, 0, 256)
        if total_steps is not None:
            check_integer("total_steps", total_steps, 1, 2**53)
        check_training(horizon, trained_on)
        self.hidden_size, self.total_steps = hidden_size, total_steps
        self.horizon, self.trained_on = horizon, trained_on
        self.hidden_weight = nn.Parameter(torch.randn(FEATURES, hidden_size) / math.sqrt(FEATURES))
        self.hidden_bias = nn.Parameter(torch.zeros(1, hidden_size))
        self.output_weight = nn.Parameter(torch.zeros(hidden_size, OUTPUTS))
        self.direct_weight = nn.Parameter(_direct())
        self.output_bias = nn.Parameter(torch.tensor([[0.0, 0.0, 0.0, 0.0]]))
        # b, the tensor's share in s, log k, a, decays of g and g²; share, a and decays before a sigmoid.
        decays = [math.log(decay / (1 - decay)) for decay in (DECAYS[0], DECAYS[2])]
        self.scalars = nn.Parameter(torch.tensor([[math.log(0.1), 0.0, math.log(3.0), 0.0, *decays]]))

    # --------------------------------------------------------------------------------------------------------- state

    def init_state(self, params: Params, *, tasks: bool = False) -> RuleState:
        """Zeros: :data:`SHAPED` [*shape], ``tensor`` [5], and ``count``; a task axis comes first.

        ``tensor`` holds the moving means of :data:`TENSOR_DECAYS`, then ℓ.
        """
        per_tensor = []
        for p in tensor_leaves(params, tasks=tasks):
            lead = p.shape[:1] if tasks else ()
            dtype = arithmetic_dtype([p])
            entry = {name: torch.zeros_like(p.detach(), dtype=dtype) for name in SHAPED}
            entry["tensor"] = torch.zeros(*lead, len(TENSOR_DECAYS) + 1, dtype=dtype, device=p.device)
            entry["count"] = torch.zeros(lead, dtype=torch.int64, device=p.device)
            per_tensor.append(entry)
        return RuleState(tuple(per_tensor), {}, tasks)

    def _check_state(self, state: Any, leaves: Sequence[Tensor]) -> None:
        rule = type(self).__name__
        if not isinstance(state, RuleState):
            raise TypeError(f"state must be a RuleState as init_state makes it, got {type(state).__name__}")
        if len(state.per_tensor) != len(leaves):
            raise ValueError(f"state must be that of params, {len(leaves)} tensors, got {len(state.per_tensor)}")
        for index, (entry, p) in enumerate(zip(state.per_tensor, leaves, strict=True)):
            lead = tuple(p.shape[:1]) if state.tasks else ()
            shapes: dict[str, tuple[int, ...]] = {name: tuple(p.shape) for name in SHAPED}
            shapes |= {"tensor": (*lead, len(TENSOR_DECAYS) + 1), "count": lead}
            check_entry(f"state of tensor {index}", rule, entry, shapes)

    # ---------------------------------------------------------------------------------------------------------- step

    def forward(
        self, params: Params, grads: Params, state: RuleState, *, loss: Tensor | None = None
    ) -> tuple[Params, RuleState]:
        """One step of all tensors of all tasks; see :meth:`metakern.rules.Rule.forward`."""
        del loss
        leaves, grad_leaves, rebuild = matched_leaves(params, grads)
        self._check_state(state, leaves)
        active = [index for index, p in enumerate(leaves) if p.numel()]
        if not active:
            return params, state
        new, per_tensor = list(leaves), list(state.per_tensor)
        moved, entries = self._step(
            [leaves[index] for index in active],
            [grad_leaves[index] for index in active],
            [per_tensor[index] for index in active],
            state.tasks,
        )
        for index, p, entry in zip(active, moved, entries, strict=True):
            new[index], per_tensor[index] = p, entry
        return rebuild(new), RuleState(tuple(per_tensor), state.shared, state.tasks)

    def _step(
        self, leaves: list[Tensor], grads: list[Tensor], entries: Sequence[Mapping[str, Tensor]], tasks: bool
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        dtype = arithmetic_dtype(leaves)
        num_tasks = leaves[0].shape[0] if tasks else 1
        sizes = [p.numel() // num_tasks for p in leaves]

        def flat(xs: Sequence[Tensor]) -> Tensor:
            return torch.cat([x.reshape(num_tasks, -1) for x in xs], 1).to(dtype)

        def spread(x: Tensor) -> Tensor:  # [T, M] to [T, P]
            return torch.cat([column.expand(-1, n) for column, n in zip(x.split(1, 1), sizes, strict=True)], 1)

        p, g = flat(leaves), flat(grads)
        old = {name: flat([entry[name] for entry in entries]) for name in SHAPED}
        count = torch.stack([entry["count"].reshape(num_tasks) for entry in entries], 1) + 1  # [T, M]
        tensor = torch.stack([entry["tensor"].reshape(num_tasks, -1) for entry in entries], 1).to(dtype)
        steps = count.to(dtype)
        base = self._weight(self.scalars, dtype)  # [1 or T, 1, 6] or [1, 6]
        decays = [torch.sigmoid(base[..., 4]), base.new_tensor(DECAYS[1]), torch.sigmoid(base[..., 5])]
        corrections = [-torch.expm1(steps * decay.log()) for decay in decays]

        square = torch.lerp(g * g, old["square"], decays[2])
        mean, slow = torch.lerp(g, old["mean"], decays[0]), torch.lerp(g, old["slow"], decays[1])
        scale = (square / spread(corrections[2]) + _EPS).rsqrt()
        fast, late, now = mean * scale / spread(corrections[0]), slow * scale / spread(corrections[1]), g * scale
        before = -old["last"]
        sums = torch.stack(
            [now * before, now * now, before * before, fast * fast, late * late, fast * late, p * p, g * g]
        )
        means = torch.stack([x.mean(2) for x in sums.split(sizes, 2)], 2)  # [8, T, M]

        tensor, level, features = self._features(means, tensor, steps, sizes, leaves, tasks)
        outputs = features @ self._weight(self.direct_weight, dtype) + self._weight(self.output_bias, dtype)
        hidden = torch.tanh(features @ self._weight(self.hidden_weight, dtype) + self._weight(self.hidden_bias, dtype))
        outputs = torch.tanh(outputs + hidden @ self._weight(self.output_weight, dtype))
        change, factor, of_slow, of_grad = outputs.unbind(2)
        rate = (tensor[..., -1] + RATE * change).clamp(-RANGE, RANGE)
        tensor = torch.cat([tensor[..., :-1], rate.unsqueeze(2)], 2)
        share = torch.sigmoid(base[..., 1])
        log_size = base[..., 0] + rate + FACTOR * factor + share * level[0] + (1 - share) * level[1]
        size = log_size.exp() * self._schedule(steps)
        step = -spread(size) * fast - spread(size * of_slow) * late - spread(size * of_grad) * now
        released = spread((base[..., 2] - steps.log()).clamp(max=0).exp())
        waiting, at_once = old["delayed"] + step, torch.sigmoid(base[..., 3])
        last = at_once * step + (1 - at_once) * released * waiting
        moved = p + last

        kept = {"mean": mean, "slow": slow, "square": square, "delayed": (1 - released) * waiting, "last": last}
        pieces = {name: x.split(sizes, 1) for name, x in kept.items()}
        found = []
        for index, (leaf, entry) in enumerate(zip(leaves, entries, strict=True)):
            of_leaf = {name: pieces[name][index].reshape(leaf.shape).to(entry[name].dtype) for name in kept}
            of_leaf["tensor"] = tensor[:, index].reshape(entry["tensor"].shape).to(entry["tensor"].dtype)
            of_leaf["count"] = entry["count"] + 1
            found.append(of_leaf)
        new = [x.reshape(leaf.shape).to(leaf.dtype) for x, leaf in zip(moved.split(sizes, 1), leaves, strict=True)]
        return new, found

    def _weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype)

    def _schedule(self, steps: Tensor) -> Tensor | float:
        """Share of the step that ``total_steps`` leaves."""
        if self.total_steps is None:
            return 1.0
        done = ((steps - 1) / self.total_steps).clamp(max=1)
        return LAST + (1 - LAST) * (1 + torch.cos(math.pi * done)) / 2

    @staticmethod
    def _features(
        means: Tensor, tensor: Tensor, steps: Tensor, sizes: Sequence[int], leaves: Sequence[Tensor], tasks: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """New moving means of the tensors, [T, M, 5], logarithms of sizes [T, M], and features [T, M, F]."""
        product, now, before, fast, late, between, values, energy = means.unbind(0)
        agreement = product / (now * before + _TINY).sqrt()
        fresh = torch.stack([agreement, agreement, energy, energy], 2)
        decays = fresh.new_tensor(TENSOR_DECAYS)
        ema = torch.lerp(fresh, tensor[..., :-1], decays)
        corrected = ema / -torch.expm1(steps.unsqueeze(2) * decays.log())
        share = fresh.new_tensor(sizes) / sum(sizes)
        whole = (values * share).sum(1, keepdim=True) + SMALLEST**2
        own = torch.maximum(values, SHARE**2 * whole)
        levels = own.log() / 2, (whole.log() / 2).expand_as(own)
        energies = (corrected[..., 2:] + 1e-30).log()
        axes = fresh.new_tensor([float(p.dim() - int(tasks) > 1) for p in leaves])
        numbers = fresh.new_tensor([math.log(n) for n in sizes])
        first = [
            agreement,
            2 * corrected[..., 0],
            2 * corrected[..., 1],
            ((fast + 1e-4).log() / 4 + 0.5),
            ((late + 1e-4).log() / 4 + 1),
            between / (fast * late + 1e-12).sqrt(),
            ((energies[..., 0] - energies[..., 1]) / 2).clamp(-3, 3),
            tensor[..., -1] / 2,
        ]
        own_features = [
            *first,
            (((energy + 1e-30).log() - energies[..., 1]) / 4).clamp(-3, 3),
            (levels[0] - levels[1]) / 2,
            axes.expand_as(own),
            (numbers / 4 - 1).expand_as(own),
            steps.log() / 4 - 1,
            (-steps / 10).exp(),
        ]
        stacked = torch.stack(own_features, 2)
        whole_task = stacked[..., :AVERAGED].mean(1, keepdim=True).expand(-1, len(leaves), -1)
        return torch.cat([ema, tensor[..., -1:]], 2), levels, torch.cat([stacked, whole_task], 2)

    # ---------------------------------------------------------------------------------------------------------- rest

    def extra_repr(self) -> str:
        """The options."""
        return f"hidden_size={self.hidden_size}, total_steps={self.total_steps}"

    def described(self) -> str:
        """Description for the model card."""
        return (
            "A learned optimizer: Adam's direction for every parameter, and a network of "
            f"{self.hidden_size} hidden units that sets every tensor's step size from how well gradients agree with "
            "its last steps. A part of each step is delayed, which averages noise."
        )


def _direct() -> Tensor:
    """Initial direct connections [F, OUTPUTS]: ℓ grows with the agreement, and steps shrink slowly with time."""
    weight = torch.zeros(FEATURES, OUTPUTS)
    weight[1, 0], weight[FEATURES - AVERAGED + 1, 0] = 0.3, 0.45
    weight[12, 1] = -0.2
    return weight
