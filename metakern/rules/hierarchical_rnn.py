"""The hierarchical RNN optimizer: GRUs for every parameter, every tensor and the whole problem.

Wichrowska et al. 2017, "Learned optimizers that scale and generalize", arXiv 1703.04813.

Axis legend: M tensors, T tasks, n coordinates of one tensor of one task, ``*shape`` the shape of a parameter tensor, H
hidden units of the parameter GRU, R = 11 + H rows of the state of a coordinate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.core.backend import check_backend
from metakern.core.counter_draws import key_of, uniform
from metakern.core.task_params import Rebuild
from metakern.core.torch_private import pytree
from metakern.ops.hrnn_step import MAX_HIDDEN, Step, hrnn_step, prepare
from metakern.ops.hrnn_step.reference import FEATURES, READOUTS, SCALES, Weights, num_rows
from metakern.ops.hrnn_step.stacked import hrnn_step_stacked
from metakern.rules.bias_gru import Affine, BiasGRU, drawn
from metakern.rules.pretrained import PretrainedRule
from metakern.rules.protocol import (
    Params,
    RuleState,
    arithmetic_dtype,
    check_entry,
    check_integer,
    check_training,
    matched_leaves,
    named_leaves,
    on_reference,
    tensor_leaves,
)

#: Largest hidden size of the tensor's and of the global GRU.
MAX_UPPER_HIDDEN = 512

#: The initial ℓ of a coordinate is a number of its own plus one of its tensor, both uniform in this range.
LOG_RATES = (0.5 * math.log(1e-6), 0.5 * math.log(1e-2))

#: Mean and standard deviation of the initial weights of ĝ in δ.
SCALES_WEIGHT = (1 / SCALES, 0.05)

#: Initial scalars: biases of the log rate, the scale decay and the input decay; the offset o; m before its sigmoid.
SCALARS = (0.0, 3.2, 2.2, -1.0, 3.2)

#: Version of the state; a checkpoint of another one is refused.
STATE_VERSION = 1


class HierarchicalRNN(PretrainedRule):
    """Hierarchical RNN optimizer: a small GRU per parameter, biased by one per tensor and one for the problem.

    A step, with moving means a of the gradient at four scales and ms of their squares, ĝ = asinh(a/√ms):

    - features of a coordinate: ĝ, products of neighbouring scales, log ms and the log learning rate ℓ, both centred;
    - parameter GRU (10 units): h0' of the features, biased by affine maps of the old states h1 and h2;
    - tensor GRU (20): h1' of the means of h0' and of the features over the tensor, biased by h2;
    - global GRU (20): h2' of the mean of the tensors' new states. The authors' public code feeds it the state of the
      last tensor alone;
    - δ = h0'·w_u + ĝ·w_s, divided by its root mean square over the tensor; ℓ_step = clip(ℓ + h0'·w_lr + b, ±33);
      θ' = θ - exp(ℓ_step + o) δ; ℓ' = m ℓ + (1 - m) ℓ_step; new decays of a and ms by sigmoid readouts of h0'.

    Everything per coordinate, and the means, is one call of :func:`metakern.ops.hrnn_step` for all tensors and tasks;
    the tensor and global GRUs are plain PyTorch. New params depend on all gradients of their tensor, and later ones, by
    h1 and h2, on all gradients of the task: a non-finite gradient spreads to its tensor, and in the next steps to its
    task. Tasks never mix.

    With ``attention`` the rule also says where the next gradient is to be taken, :meth:`gradient_points`: at
    θ - exp(ℓ_step) δ_a, with θ the params before the step and δ_a = h0'·w_a divided by its root mean square. In
    ``adapt``, ``meta_loss`` and ``RuleLearner`` the losses and gradients of the inner steps are those at these points,
    also the losses that a meta-objective counts; the results are the params. LearnedOptimizer needs a closure.

    The initial ℓ of a coordinate is U(-6.9, -2.3) plus a number of its tensor from the same range. Both depend on
    ``seed``, the tensor's name and the coordinate's place alone: no generator is used, all tasks start alike, and a
    rule that is saved and loaded draws the same. Change ``seed`` for other numbers. Meta-training by ``RuleLearner``
    changes it with the problems' initial parameters, so that the rule does not fit one draw.

    The state holds 4 (11 + H) bytes a coordinate, 84 for H = 10.

    Args:
        hidden_size: H of the parameter GRU, 1 to 32. The CPU kernels are compiled for 10; other sizes run by the
            reference there.
        tensor_hidden_size: units of the tensor GRU, 1 to 512.
        global_hidden_size: units of the global GRU, 1 to 512.
        attention: whether the rule chooses where gradients are taken.
        seed: of the initial log learning rates.
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"reference"``; None is ``"auto"``.
        horizon: steps that the rule was meta-trained for; only used by LearnedOptimizer, which warns beyond it.
        trained_on: description of the meta-training tasks, for the model card and that warning.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Example:
        >>> rule = HierarchicalRNN()
        >>> params = {"weight": torch.randn(10, 3), "bias": torch.zeros(10)}
        >>> state = rule.init_state(params)
        >>> grads = {name: 2 * p for name, p in params.items()}
        >>> params, state = rule(params, grads, state)
    """

    title: ClassVar[str] = "Hierarchical RNN"
    draws_state: ClassVar[bool] = True
    takes_copies: ClassVar[bool] = True
    optional_options: ClassVar[tuple[str, ...]] = ("backend", *PretrainedRule.optional_options)

    def __init__(
        self,
        hidden_size: int = 10,
        tensor_hidden_size: int = 20,
        global_hidden_size: int = 20,
        *,
        attention: bool = False,
        seed: int = 0,
        backend: str | None = None,
        horizon: int | None = None,
        trained_on: str | None = None,
    ) -> None:
        super().__init__()
        sizes = (("hidden_size", hidden_size, MAX_HIDDEN), ("tensor_hidden_size", tensor_hidden_size, MAX_UPPER_HIDDEN))
        for name, value, most in (*sizes, ("global_hidden_size", global_hidden_size, MAX_UPPER_HIDDEN)):
            check_integer(name, value, 1, most)
        check_integer("seed", seed, 0, 2**63 - 1)
        if not isinstance(attention, bool):
            raise TypeError(f"attention must be a bool, got {attention!r}")
        check_backend(backend)
        prepare(backend)
        check_training(horizon, trained_on)
        self.hidden_size, self.tensor_hidden_size = hidden_size, tensor_hidden_size
        self.global_hidden_size = global_hidden_size
        self.attention, self.seed, self.backend = attention, seed, backend
        self.horizon, self.trained_on = horizon, trained_on
        self.parameter_gru = BiasGRU(FEATURES, hidden_size)
        self.tensor_gru = BiasGRU(hidden_size + FEATURES, tensor_hidden_size)
        self.global_gru = BiasGRU(tensor_hidden_size, global_hidden_size)
        self.tensor_to_parameter = Affine(tensor_hidden_size, 3 * hidden_size)
        self.global_to_parameter = Affine(global_hidden_size, 3 * hidden_size)
        self.global_to_tensor = Affine(global_hidden_size, 3 * tensor_hidden_size)
        readouts = drawn(len(READOUTS) if attention else len(READOUTS) - 1, hidden_size)
        readouts[READOUTS.index("rate")] = 0
        if attention:
            readouts[READOUTS.index("attention")] = readouts[READOUTS.index("direction")]
        self.readouts = nn.Parameter(readouts)
        mean, deviation = SCALES_WEIGHT
        self.scales = nn.Parameter(mean + deviation * torch.randn(SCALES))
        self.scalars = nn.Parameter(torch.tensor(SCALARS))

    # --------------------------------------------------------------------------------------------------------- state

    def init_state(self, params: Params, *, tasks: bool = False, seeds: Sequence[int] | None = None) -> RuleState:
        """The learned initial hidden states, zero moving means and decays, and the drawn log learning rates.

        Per tensor: ``coordinates`` [T, R, n], ``tensor`` [T, tensor_hidden_size], ``mean_rate`` [T], the mean of ℓ,
        and with attention ``attended`` [T, *shape]. Shared: ``global`` [T, global_hidden_size]. No T without tasks.

        Args:
            params: see :meth:`metakern.rules.Rule.init_state`
            tasks: likewise
            seeds: one per task, in place of the rule's own for all of them
        """
        leaves, named = tensor_leaves(params, tasks=tasks), named_leaves(params)
        first = leaves[0] if leaves else self.scalars
        lead = first.shape[:1] if tasks and leaves else ()
        of_weights = lead if self.copies is None else ()  # copies have the axis already
        dtype = arithmetic_dtype(leaves)
        per_tensor = []
        for name, p in zip(named, leaves, strict=True):
            keys = [key_of(seed, name) for seed in ([self.seed] if seeds is None else seeds)]
            coordinates, mean_rate = self._init_coordinates(keys, math.prod(p.shape[len(lead) :]), dtype, p.device)
            if seeds is None:
                mean_rate = _repeated(mean_rate[0], lead)
                coordinates = _repeated(coordinates[0], lead) if self.copies is None else coordinates
            entry = {
                "coordinates": coordinates,
                "tensor": _repeated(self.tensor_gru.initial.to(dtype), of_weights),
                "mean_rate": mean_rate,
            }
            per_tensor.append(entry | ({"attended": p.to(dtype, copy=True)} if self.attention else {}))
        shared = {"global": _repeated(self.global_gru.initial.to(first.device, dtype), of_weights)}
        return RuleState(tuple(per_tensor), shared, tasks)

    def _init_coordinates(
        self, keys: Sequence[int], number: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The state [T, R, n] of one tensor for T keys or copies of the weights, and the means of ℓ, one per key."""
        low, high = LOG_RATES
        draws = uniform(keys, number + 1, device)
        rate = (2 * low + (high - low) * (draws[:, :1] + draws[:, 1:])).to(dtype)
        initial = self.parameter_gru.initial.to(dtype).view(self.copies or 1, -1, 1)
        num_tasks = max(len(keys), len(initial))
        h = initial.expand(num_tasks, -1, number)
        zeros = functools.partial(h.new_zeros, num_tasks)
        rates = rate.unsqueeze(1).expand(num_tasks, -1, -1)
        coordinates = torch.cat([h, zeros(2 * SCALES, number), rates, zeros(2, number)], 1)
        # Row by row: a sum over both axes at once may add in another order.
        return coordinates, torch.stack([row.sum() for row in rate]) / max(number, 1)

    def state_header(self) -> dict[str, Any]:
        """The sizes, whether there is attention, and the version of the state."""
        sizes = {name: getattr(self, name) for name in ("hidden_size", "tensor_hidden_size", "global_hidden_size")}
        return {"rule": type(self).__name__, "state_version": STATE_VERSION, **sizes, "attention": self.attention}

    @property
    def moves_gradients(self) -> bool:
        """Whether the rule has attention."""
        return self.attention

    def gradient_points(self, params: Params, state: RuleState) -> Params:
        """Where the next gradient is to be taken: the attended points, or ``params`` without attention."""
        if not self.attention:
            return params
        leaves, structure = pytree.tree_flatten(params)
        self.check_state(state, leaves)
        points = [entry["attended"].to(p.dtype) for entry, p in zip(state.per_tensor, leaves, strict=True)]
        return pytree.tree_unflatten(points, structure)

    def check_state(self, state: Any, leaves: Sequence[Tensor]) -> None:
        """Raise TypeError or ValueError unless it is a state of this rule for params of these shapes."""
        if not isinstance(state, RuleState):
            raise TypeError(f"state must be a RuleState as init_state makes it, got {type(state).__name__}")
        if len(state.per_tensor) != len(leaves) or state.shared.keys() != {"global"}:
            raise ValueError(
                f"state must be one of {type(self).__name__} for {len(leaves)} tensors, got one for "
                f"{len(state.per_tensor)} with {sorted(state.shared)} shared"
            )
        lead = leaves[0].shape[:1] if state.tasks and leaves else torch.Size()
        shapes = {"global": (*lead, self.global_hidden_size)}
        check_entry("state", type(self).__name__, state.shared, shapes)
        rows = num_rows(self.hidden_size)
        for index, (entry, p) in enumerate(zip(state.per_tensor, leaves, strict=True)):
            if state.tasks and p.shape[:1] != lead:
                raise ValueError(f"params must have one leading axis of tasks, {list(lead)}, got {list(p.shape)}")
            shapes = {
                "coordinates": (*lead, rows, math.prod(p.shape[len(lead) :])),
                "tensor": (*lead, self.tensor_hidden_size),
                "mean_rate": tuple(lead),
            }
            check_entry(
                f"state of tensor {index}",
                type(self).__name__,
                entry,
                shapes | ({"attended": tuple(p.shape)} if self.attention else {}),
            )

    # ---------------------------------------------------------------------------------------------------------- step

    def forward(
        self, params: Params, grads: Params, state: RuleState, *, loss: Tensor | None = None
    ) -> tuple[Params, RuleState]:
        """One step of all tensors of all tasks; see :meth:`metakern.rules.Rule.forward`."""
        (new,), (new_state,) = self.step_groups((params,), (grads,), (state,), loss=loss)
        return new, new_state

    def step_groups(
        self,
        params: Sequence[Params],
        grads: Sequence[Params],
        states: Sequence[RuleState],
        *,
        loss: Tensor | None = None,
    ) -> tuple[tuple[Params, ...], tuple[RuleState, ...]]:
        """See :meth:`metakern.rules.Rule.step_groups`; the tensor and global levels of all groups are one launch.

        With copies of the weights, all groups must have coordinates, of one dtype on one device.
        """
        del loss
        groups = [_Group.of(self, *of_group) for of_group in zip(params, grads, states, strict=True)]
        active = [group for group in groups if group.active]
        if active:
            device = active[0].leaves[0].device.type
            alike = len({(group.dtype, group.leaves[0].device) for group in active}) == 1
            with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
                for together in [active] if alike else [[group] for group in active]:
                    self._step(together)
        return tuple(group.rebuild(group.new) for group in groups), tuple(group.new_state for group in groups)

    def _step(self, groups: Sequence[_Group]) -> None:
        """Step every group's coordinates, then the tensors' states and the global states of all of them."""
        tensors = [group.of_entries("tensor") for group in groups]
        of_all = [group.of_problem() for group in groups]
        levels = (_Rows if self.copies is None else _Columns)(tensors)
        problems = [len(x) for x in of_all]
        flat, shared = levels.joined(tensors), _joined(of_all)
        own: Tensor = self.parameter_gru.biases().to(groups[0].dtype)
        upper = (self.global_to_parameter(shared) + own).split(problems)
        lower = levels.parted(self.tensor_to_parameter(flat))
        steps = [
            group.step(operator, x + y)
            for group, operator, x, y in zip(
                groups, self._operators(groups[0].dtype, problems), upper, lower, strict=True
            )
        ]
        to_tensors = self.global_to_tensor(shared).split(problems)
        spread = levels.joined([x.expand(len(of), *x.shape) for x, of in zip(to_tensors, tensors, strict=True)])
        means = levels.joined([result.means[..., :-1] for result in steps])
        new_tensors = levels.parted(self.tensor_gru(means, flat, spread))
        new_all: Tensor = self.global_gru(_joined([x.mean(0) for x in new_tensors]), shared)
        for group, result, tensor, x in zip(groups, steps, new_tensors, new_all.split(problems), strict=True):
            group.take(result, tensor, x)

    def _operators(self, dtype: torch.dtype, problems: Sequence[int]) -> list[Callable[..., Step]]:
        """:func:`metakern.ops.hrnn_step` for every group of this number of problems, with its weights."""
        weights = [w.to(dtype) for w in self.weights()]
        if self.copies is None:
            return [functools.partial(hrnn_step, weights=weights, backend=self.backend)] * len(problems)
        of_groups = zip(*(w.split(list(problems)) for w in weights), strict=True)
        return [functools.partial(hrnn_step_stacked, weights=list(own), backend=self.backend) for own in of_groups]

    def weights(self) -> list[Tensor]:
        """The weights of :func:`metakern.ops.hrnn_step`, in order."""
        gru = self.parameter_gru
        return list(Weights(gru.gates_weight, gru.candidate_weight, self.readouts, self.scales, self.scalars))

    def step_(
        self, params: Params, grads: Params, state: RuleState, lr: float = 1.0, *, loss: Tensor | None = None
    ) -> None:
        """One step in place, without a graph; ``lr`` also scales how far the attended points are from the params."""
        old = [p.clone() for p in pytree.tree_leaves(params)] if self.attention and lr != 1 else []
        super().step_(params, grads, state, lr, loss=loss)
        for p, entry in zip(old, state.per_tensor, strict=False):
            entry["attended"].copy_(torch.lerp(p, entry["attended"], lr))

    # ----------------------------------------------------------------------------------------------------------- rest

    def plain(self) -> HierarchicalRNN:
        """A copy of the rule that runs by the reference, one launch per operation."""
        return on_reference(self)

    def extra_repr(self) -> str:
        """The options not shown by the submodules."""
        horizon = "" if self.horizon is None else f", horizon={self.horizon}"
        return f"attention={self.attention}, seed={self.seed}, backend={self.backend!r}{horizon}"

    def described(self) -> str:
        """Description for the model card."""
        sizes = f"{self.hidden_size}, {self.tensor_hidden_size} and {self.global_hidden_size}"
        return (
            "A learned optimizer: a hierarchy of GRUs, one for every parameter, one for every tensor and one for the "
            "whole problem, turns gradients into updates (Wichrowska et al. 2017, "
            "[arXiv 1703.04813](https://arxiv.org/abs/1703.04813)).\n"
            f"They have {sizes} units{', and it chooses where gradients are taken' if self.attention else ''}."
        )


class _Group:
    """Tasks with the same tensors, in one step: what goes in, and what came out.

    Attributes:
        leaves: the params
        grads: their gradients
        rebuild: builds the tree of params from new leaves
        state: before the step
        active: indices of the tensors that have coordinates
        new: the new params
        new_state: after the step
    """

    def __init__(self, leaves: list[Tensor], grads: list[Tensor], rebuild: Rebuild, state: RuleState) -> None:
        self.leaves, self.grads, self.rebuild, self.state = leaves, grads, rebuild, state
        skip = 1 if state.tasks else 0
        self.active = [index for index, p in enumerate(leaves) if math.prod(p.shape[skip:])]
        self.new, self.new_state = list(leaves), state

    @classmethod
    def of(cls, rule: HierarchicalRNN, params: Params, grads: Params, state: RuleState) -> _Group:
        """The group, checked."""
        leaves, grad_leaves, rebuild = matched_leaves(params, grads)
        rule.check_state(state, leaves)
        return cls(leaves, grad_leaves, rebuild, state)

    @property
    def dtype(self) -> torch.dtype:
        """That of the arithmetic."""
        return arithmetic_dtype(self.leaves[index] for index in self.active)

    def of_entries(self, key: str) -> Tensor:
        """A state tensor of all tensors, [M, T, ...]."""
        entries = torch.stack([self.state.per_tensor[index][key] for index in self.active]).to(self.dtype)
        return entries if self.state.tasks else entries.unsqueeze(1)

    def of_problem(self) -> Tensor:
        """The global states, [T, ...]."""
        of_all = self.state.shared["global"].to(self.dtype)
        return of_all if self.state.tasks else of_all.unsqueeze(0)

    def step(self, operator: Callable[..., Step], biases: Tensor) -> Step:
        """The step of the coordinates by :func:`metakern.ops.hrnn_step`, which has its weights already."""
        dtype = self.dtype
        params, grads = ([xs[index] for index in self.active] for xs in (self.leaves, self.grads))
        entries: Sequence[dict[str, Tensor]] = [self.state.per_tensor[index] for index in self.active]
        if not self.state.tasks:
            params, grads = ([x.unsqueeze(0) for x in xs] for xs in (params, grads))
            entries = [{key: x.unsqueeze(0) for key, x in entry.items()} for entry in entries]
        if any(p.dtype != params[0].dtype for p in (*params, *grads)):
            params, grads = ([x.to(dtype) for x in xs] for xs in (params, grads))
        mean_rate = _mean_rate(params, [entry["mean_rate"].to(dtype) for entry in entries])
        coordinates = [entry["coordinates"].to(dtype) for entry in entries]
        return operator(params, grads, coordinates, biases, mean_rate)

    def take(self, step: Step, tensor: Tensor, of_all: Tensor) -> None:
        """Put the results in the places of what went in."""
        per_tensor, rates = list(self.state.per_tensor), step.means[..., -1]
        for at, index in enumerate(self.active):
            p, old = self.leaves[index], per_tensor[index]
            self.new[index] = step.params[at].view(p.shape).to(p.dtype)
            entry = {"coordinates": step.states[at], "tensor": tensor[at], "mean_rate": rates[at]}
            if step.attended:
                entry["attended"] = step.attended[at]
            per_tensor[index] = {key: x.reshape(old[key].shape).to(old[key].dtype) for key, x in entry.items()}
        old_global = self.state.shared["global"]
        shared = {"global": of_all.reshape(old_global.shape).to(old_global.dtype)}
        self.new_state = RuleState(tuple(per_tensor), shared, self.state.tasks)


class _Rows:
    """The tensors of several groups, [M, T, ...] each, as one [rows, ...]; those of one group as they are."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self.sizes = [x.shape[:2] for x in groups]

    def joined(self, xs: Sequence[Tensor]) -> Tensor:
        """One tensor of all groups."""
        return xs[0] if len(xs) == 1 else torch.cat([x.flatten(0, 1) for x in xs])

    def parted(self, x: Tensor) -> list[Tensor]:
        """The inverse."""
        rows = x.split([math.prod(size) for size in self.sizes]) if len(self.sizes) > 1 else [x]
        return [row.view(*size, row.shape[-1]) for row, size in zip(rows, self.sizes, strict=True)]


class _Columns:
    """The same as [most M, all T, ...], so that every task meets weights of its own; zeros stand where M is less."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self.counts, self.tasks = [len(x) for x in groups], [x.shape[1] for x in groups]

    def joined(self, xs: Sequence[Tensor]) -> Tensor:
        """One tensor of all groups."""
        most = max(self.counts)
        padded = [x if len(x) == most else F.pad(x, (0, 0) * (x.dim() - 1) + (0, most - len(x))) for x in xs]
        return padded[0] if len(padded) == 1 else torch.cat(padded, 1)

    def parted(self, x: Tensor) -> list[Tensor]:
        """The inverse."""
        return [column[:count] for column, count in zip(x.split(self.tasks, 1), self.counts, strict=True)]


def _joined(rows: Sequence[Tensor]) -> Tensor:
    """The rows of all groups."""
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def _repeated(x: Tensor, lead: Sequence[int]) -> Tensor:
    """A copy with the task axis ``lead`` in front, if there is one."""
    return x.expand((*lead, *x.shape)).clone()


def _mean_rate(params: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
    """Mean of ℓ over all coordinates of a task, [T], from the means over its tensors."""
    sizes = [math.prod(p.shape[1:]) for p in params]
    parts = [x * (size / sum(sizes)) for x, size in zip(means, sizes, strict=True)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else means[0]
