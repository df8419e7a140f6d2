"""Per-parameter MLP optimizers: small_fc_lopt, µLO and ELO, as settings of one rule.

Metz et al. 2022, "Practical tradeoffs between memory, compute, and performance in learned optimizers",
arXiv 2203.11860; µLO: Thérien et al. 2024, arXiv 2406.00153.

Axis legend: T tasks, ``*shape`` the shape of one parameter tensor, W hidden units.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from metakern.core.backend import check_backend
from metakern.core.checks import is_number
from metakern.ops.mlp_update_step import (
    DECAYS,
    HIDDEN_LAYERS,
    RANKS,
    TENSOR_FEATURES,
    TIME_FEATURES,
    WIDTHS,
    Moments,
    factor_shapes,
    mlp_update_step,
)
from metakern.ops.mlp_update_step.stacked import mlp_update_step_stacked
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
from metakern.rules.published_mlp import read_published

#: Decays β₀ of the moving means of g (3), of g² (1) and of the factors (3).
BASE_DECAYS = (0.9, 0.99, 0.999, 0.999, 0.9, 0.99, 0.999)

#: µLO's trained decays, as offsets δ; they are not in the file of its weights.
MULO_OFFSETS = (0.15216392, 0.14245212, 0.06812963, 0.01079706, 0.18621896, -0.10864615, -0.06185547)

INPUTS = TENSOR_FEATURES + TIME_FEATURES


class PerParameterMLP(PretrainedRule):
    """Per-parameter MLP optimizer: one small MLP, shared by all coordinates, computes every parameter's update.

    Its inputs are 28 features of the coordinate, from moving means of the gradient, of its square and of Adafactor's
    rows and columns, and 11 of the time; see :func:`metakern.ops.mlp_update_step`, which takes the step of all tensors
    of all tasks in one launch. Its outputs are a direction d and a magnitude s:

    θ ← θ − lr · step_mult · d · exp(exp_mult · s), then θ ← θ − lr · weight_decay · θ.

    The state holds 4 moments a coordinate (16 bytes in float32) and 3 numbers a row and a column; for tensors of one
    axis 7 a coordinate.

    :meth:`small_fc_lopt`, :meth:`mulo` and :meth:`elo` have the settings of the published optimizers, and
    :meth:`from_published` loads weights that were published for them.

    Args:
        hidden_size: W, 4 to 64.
        hidden_layers: layers of W units, 1 to 4.
        lr: factor of the update and of the weight decay.
        step_mult: factor of the direction.
        exp_mult: factor of the magnitude in the exponent.
        weight_decay: decoupled weight decay of every step.
        decay_update: whether the decay shrinks θ after its update, as above; if not, it shrinks the old θ:
            θ ← θ − lr · (step_mult · d · exp(exp_mult · s) + weight_decay · θ), as ELO does.
        width_multiplier: how many times wider the network is than the one that the rule is tuned for: lr of tensors
            with two or more axes is divided by it (maximal update parametrisation, µP).
        learned_decays: whether the decays of the moving means are trained with the weights.
        backend: ``"auto"``, ``"cpp"``, ``"triton"`` or ``"reference"``; None is ``"auto"``.
        horizon: steps that the rule was meta-trained for; only used by LearnedOptimizer, which warns beyond it.
        trained_on: description of the meta-training tasks, for the model card and that warning.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Example:
        >>> rule = PerParameterMLP(hidden_size=4)
        >>> params = {"weight": torch.randn(10, 3), "bias": torch.zeros(10)}
        >>> state = rule.init_state(params)
        >>> grads = {name: 2 * p for name, p in params.items()}
        >>> params, state = rule(params, grads, state)
    """

    title: ClassVar[str] = "Per-parameter MLP"
    takes_copies: ClassVar[bool] = True
    optional_options: ClassVar[tuple[str, ...]] = ("backend", *PretrainedRule.optional_options)

    def __init__(
        self,
        hidden_size: int = 32,
        hidden_layers: int = 2,
        *,
        lr: float = 1.0,
        step_mult: float = 0.01,
        exp_mult: float = 0.001,
        weight_decay: float = 0.0,
        decay_update: bool = True,
        width_multiplier: float = 1.0,
        learned_decays: bool = False,
        backend: str | None = None,
        horizon: int | None = None,
        trained_on: str | None = None,
    ) -> None:
        super().__init__()
        check_integer("hidden_size", hidden_size, WIDTHS[0], WIDTHS[-1])
        check_integer("hidden_layers", hidden_layers, HIDDEN_LAYERS[0], HIDDEN_LAYERS[-1])
        numbers = {"lr": lr, "step_mult": step_mult, "exp_mult": exp_mult, "weight_decay": weight_decay}
        for name, value in {**numbers, "width_multiplier": width_multiplier}.items():
            _check_number(name, value)
        if width_multiplier == 0:
            raise ValueError("width_multiplier must be greater than 0, got 0")
        for name, flag in (("decay_update", decay_update), ("learned_decays", learned_decays)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be a bool, got {flag!r}")
        check_backend(backend)
        check_training(horizon, trained_on)
        self.hidden_size, self.hidden_layers = hidden_size, hidden_layers
        self.lr, self.step_mult, self.exp_mult = float(lr), float(step_mult), float(exp_mult)
        self.weight_decay, self.decay_update = float(weight_decay), decay_update
        self.width_multiplier, self.learned_decays = float(width_multiplier), learned_decays
        self.backend, self.horizon, self.trained_on = backend, horizon, trained_on
        self.network = _network(hidden_size, hidden_layers)
        offsets = torch.zeros(sum(DECAYS))
        if learned_decays:
            self.decay_offsets: Tensor = nn.Parameter(offsets)
        else:
            self.register_buffer("decay_offsets", offsets)

    # ---------------------------------------------------------------------------------------------- published settings

    @classmethod
    def small_fc_lopt(cls, hidden_size: int = 4, hidden_layers: int = 2, **options: Any) -> Self:
        """Metz et al.'s: 39-4-4-2, ``step_mult`` 0.001, learned decays."""
        return cls(hidden_size, hidden_layers, **{"step_mult": 0.001, "learned_decays": True, **options})

    @classmethod
    def mulo(cls, hidden_size: int = 32, hidden_layers: int = 2, **options: Any) -> Self:
        """µLO: 39-32-32-2, ``step_mult`` 0.01, and the decays that its weights were trained with."""
        rule = cls(hidden_size, hidden_layers, **options)
        with torch.no_grad():
            rule.decay_offsets.copy_(torch.tensor(MULO_OFFSETS))
        return rule

    @classmethod
    def elo(cls, hidden_size: int = 32, hidden_layers: int = 2, **options: Any) -> Self:
        """ELO: ``step_mult`` 1, weight decay of the old params."""
        return cls(hidden_size, hidden_layers, **{"step_mult": 1.0, "decay_update": False, **options})

    @classmethod
    def from_published(cls, folder: str | Path, **options: Any) -> Self:
        """Load weights published for such an optimizer: ``config.json`` and ``model.safetensors``.

        The file holds ``network.{input, linear_0, …, output}.{weight, bias}`` and no decays; the configuration
        ``input_size``, ``hidden_size`` and ``hidden_layers``, which counts the layers ``linear_i``.

        Args:
            folder: a local folder
            options: the other arguments of the constructor. The file does not say what they were in training:
                ``PerParameterMLP.mulo().load_published(folder)`` loads the weights into a rule with µLO's settings.

        Raises:
            ValueError: for a missing, damaged or inconsistent file, and for missing or unexpected weights; the message
                names them.
        """
        size, layers, _ = read_published(folder)
        return cls(size, layers, **options).load_published(folder)

    def load_published(self, folder: str | Path) -> Self:
        """Load published weights into this rule, which must have their sizes; see :meth:`from_published`."""
        size, layers, weights = read_published(folder)
        if (size, layers) != (self.hidden_size, self.hidden_layers):
            raise ValueError(
                f"{folder} has hidden_size {size} and {layers} hidden layers; the rule must have the same, got "
                f"{self.hidden_size} and {self.hidden_layers}"
            )
        own = self.network.state_dict()
        self.network.load_state_dict({name: weights[f"network.{name}"].to(own[name]) for name in own})
        return self

    # ---------------------------------------------------------------------------------------------------------- decays

    def decays(self) -> Tensor:
        """Decays β of the moving means of g (3), of g² (1) and of the factors (3): 1 − exp(10 (log(1 − β₀)/10 + δ)).

        β₀ is 0.9, 0.99, 0.999 for g and the factors and 0.999 for g². The offsets δ are ``decay_offsets``; results are
        clipped to [0, 1].
        """
        logs = torch.log1p(-self.decay_offsets.new_tensor(BASE_DECAYS, dtype=torch.float64))
        decays = -torch.expm1(logs + 10 * self.decay_offsets.double())
        # Without offsets β₀ to the last bit.
        return torch.where(self.decay_offsets == 0, decays - decays.detach() + _base(decays), decays).clamp(0, 1)

    def set_decays(self, momentum: Sequence[float], square: float, factors: Sequence[float]) -> Self:
        """Set the decays of the moving means of g (3), of g² and of the factors (3); numbers in [0, 1).

        Raises:
            ValueError: for a wrong number of decays, and decays out of range.
        """
        for name, values in (("momentum", momentum), ("factors", factors)):
            if len(values) != 3:
                raise ValueError(f"{name} must hold 3 decays, got {len(values)}")
        for name, values in (("momentum", momentum), ("square", (square,)), ("factors", factors)):
            for value in values:
                if not is_number(value) or not 0 <= value < 1:
                    raise ValueError(f"decays of {name} must be numbers of at least 0 and less than 1, got {value}")
        wanted = torch.tensor([*momentum, square, *factors], dtype=torch.float64)
        base = _base(wanted)
        offsets = torch.where(wanted == base, 0.0, (torch.log1p(-wanted) - torch.log1p(-base)) / 10)
        with torch.no_grad():
            self.decay_offsets.copy_(offsets)
        return self

    # ----------------------------------------------------------------------------------------------------------- state

    def init_state(self, params: Params, *, tasks: bool = False) -> RuleState:
        """Zeros: ``m``, ``v``, ``r`` and ``c`` of every tensor, and the shared number of steps, ``count``.

        m [3, *shape], v [*shape], r [3, *shape without its largest axis], c [3, *shape without its second largest
        axis]; for a tensor of one axis r [3, n] and c [3, 0]; a task axis comes first. The count is [T] or [].

        Raises:
            ValueError: for a tensor that has not 1 to 4 axes besides that of the tasks.
        """
        leaves = tensor_leaves(params, tasks=tasks)
        _check_ranks(params, leaves, tasks)
        per_tensor = []
        for p in leaves:
            dtype = arithmetic_dtype([p])
            shapes = _state_shapes(p, tasks)
            per_tensor.append({name: torch.zeros(s, dtype=dtype, device=p.device) for name, s in shapes.items()})
        lead = leaves[0].shape[:1] if leaves and tasks else ()
        device = leaves[0].device if leaves else None
        return RuleState(tuple(per_tensor), {"count": torch.zeros(lead, dtype=torch.int64, device=device)}, tasks)

    def _check_state(self, state: Any, leaves: Sequence[Tensor]) -> None:
        if not isinstance(state, RuleState):
            raise TypeError(f"state must be a RuleState as init_state makes it, got {type(state).__name__}")
        rule = type(self).__name__
        if len(state.per_tensor) != len(leaves):
            raise ValueError(f"state must be that of params, {len(leaves)} tensors, got {len(state.per_tensor)}")
        lead = tuple(leaves[0].shape[:1]) if leaves and state.tasks else ()
        check_entry("state.shared", rule, state.shared, {"count": lead})
        for index, (entry, p) in enumerate(zip(state.per_tensor, leaves, strict=True)):
            check_entry(f"state of tensor {index}", rule, entry, _state_shapes(p, state.tasks))

    # ------------------------------------------------------------------------------------------------------------ step

    def forward(
        self, params: Params, grads: Params, state: RuleState, *, loss: Tensor | None = None
    ) -> tuple[Params, RuleState]:
        """One step of all tensors of all tasks; see :meth:`metakern.rules.Rule.forward`."""
        del loss
        leaves, grad_leaves, rebuild = matched_leaves(params, grads)
        self._check_state(state, leaves)
        if not leaves:
            return params, state
        _check_ranks(params, leaves, state.tasks)
        dtypes = {p.dtype for p in leaves}
        dtype = arithmetic_dtype(leaves)
        kind = dtypes.pop() if len(dtypes) == 1 else dtype

        def lift(x: Tensor, to: torch.dtype) -> Tensor:
            return (x if state.tasks else x.unsqueeze(0)).to(to)

        moments = Moments(*([lift(entry[name], dtype) for entry in state.per_tensor] for name in Moments._fields))
        count = state.shared["count"]
        steps = count if state.tasks else count.unsqueeze(0)
        device = leaves[0].device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            rates, keep = self._rates(leaves, state.tasks, dtype)
            decays = self.decays().to(dtype)
            if self.copies is not None and decays.dim() == 1:
                decays = decays.expand(self.copies, -1)
            new, new_moments = (mlp_update_step if self.copies is None else mlp_update_step_stacked)(
                [lift(x, kind) for x in leaves],
                [lift(x, kind) for x in grad_leaves],
                moments,
                [w.to(dtype) for w in self.network.parameters()],
                decays,
                rates,
                keep,
                steps.to(leaves[0].device),
                exp_mult=self.exp_mult,
                backend=self.backend,
            )
        per_tensor = [
            {name: x.view(old[name].shape).to(old[name].dtype) for name, x in zip(Moments._fields, xs, strict=True)}
            for old, xs in zip(state.per_tensor, zip(*new_moments, strict=True), strict=True)
        ]
        moved = [x.view(p.shape).to(p.dtype) for x, p in zip(new, leaves, strict=True)]
        return rebuild(moved), RuleState(tuple(per_tensor), {"count": count + 1}, state.tasks)

    def _rates(self, leaves: Sequence[Tensor], tasks: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Factors of the updates and of the old params, [M, T] each."""
        skip = 1 if tasks else 0
        lrs = [self.lr / (self.width_multiplier if p.dim() - skip > 1 else 1.0) for p in leaves]
        keep = [1 - lr * self.weight_decay for lr in lrs]
        rates = [lr * self.step_mult * (kept if self.decay_update else 1.0) for lr, kept in zip(lrs, keep, strict=True)]
        count = leaves[0].shape[0] if tasks else 1
        both = torch.tensor([rates, keep], dtype=dtype, device=leaves[0].device)
        of_rates, of_keep = both.unsqueeze(-1).expand(2, len(leaves), count).contiguous().unbind()
        return of_rates, of_keep

    # ------------------------------------------------------------------------------------------------------------ rest

    def plain(self) -> PerParameterMLP:
        """A copy of the rule that runs by the reference, one launch per operation."""
        return on_reference(self)

    def extra_repr(self) -> str:
        """The options not shown by the submodules."""
        names = ("lr", "step_mult", "exp_mult", "weight_decay", "width_multiplier", "learned_decays", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def described(self) -> str:
        """Description for the model card."""
        sizes = "-".join(str(n) for n in (INPUTS, *[self.hidden_size] * self.hidden_layers, 2))
        return (
            f"A learned optimizer: one small MLP ({sizes}), its weights shared by all coordinates, turns features of "
            "every gradient into its update (Metz et al. 2022, [arXiv 2203.11860](https://arxiv.org/abs/2203.11860))."
        )


def _network(hidden_size: int, hidden_layers: int) -> nn.Sequential:
    """The MLP, with the layers' published names; weights N(0, 1/fan-in) truncated at 2 deviations, biases 0."""
    layers: OrderedDict[str, nn.Linear] = OrderedDict(input=nn.Linear(INPUTS, hidden_size))
    for index in range(hidden_layers - 1):
        layers[f"linear_{index}"] = nn.Linear(hidden_size, hidden_size)
    layers["output"] = nn.Linear(hidden_size, 2)
    for layer in layers.values():
        deviation = layer.in_features**-0.5
        nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(OrderedDict[str, nn.Module](layers))


def _base(like: Tensor) -> Tensor:
    return torch.tensor(BASE_DECAYS, dtype=torch.float64, device=like.device)


def _state_shapes(param: Tensor, tasks: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the state of one tensor, with the task axis first if there is one."""
    lead, own = (tuple(param.shape[:1]), param.shape[1:]) if tasks else ((), param.shape)
    rows, columns = factor_shapes(own)
    shapes: Mapping[str, tuple[int, ...]] = {"m": (3, *own), "v": tuple(own), "r": (3, *rows), "c": (3, *columns)}
    return {name: (*lead, *shape) for name, shape in shapes.items()}


def _check_ranks(params: Params, leaves: Sequence[Tensor], tasks: bool) -> None:
    for name, p in zip(named_leaves(params), leaves, strict=True):
        rank = p.dim() - 1 if tasks else p.dim()
        if rank not in RANKS:
            raise ValueError(
                f"params must have {RANKS[0]} to {RANKS[-1]} axes besides that of tasks, got {rank} for {name!r}; "
                "reshape it, or leave it to AdamW in a group with rule=None of LearnedOptimizer"
            )


def _check_number(name: str, value: Any) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
