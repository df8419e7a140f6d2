"""LearnedOptimizer: an update rule as a :class:`torch.optim.Optimizer`.

Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent", arXiv 1606.04474.

Axis legend: N coordinates, H hidden units, L layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metakern.core.torch_private import not_compiled
from metakern.core.warn import warn_user
from metakern.optim import adamw, arena, tensorwise
from metakern.optim.checkpoints import FORMAT_VERSION as FORMAT_VERSION
from metakern.optim.checkpoints import HEADER as HEADER
from metakern.optim.checkpoints import Kept, from_checkpoint, to_checkpoint
from metakern.optim.groups import check_dense_grad, check_group, check_rate
from metakern.rules import Rule
from metakern.rules.coordinatewise import CoordinatewiseRule
from metakern.rules.pretrained import trained_or_named

#: Allowed parameter dtypes; half-precision parameters are stepped in float32.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

#: Arena or Tensorwise (parameters of one group stepped together), and the slot of one parameter in it.
_Arena = Any
_Slot = Any


class LearnedOptimizer(Optimizer):
    """Trains a model with an update rule, learned or not; the rule itself does not change.

    θ' = (1 − lr · weight_decay) · θ + lr · rule(∇θ, state). A parameter whose ``grad`` is None is skipped: neither it
    nor its state moves, nor does it decay. Coordinatewise rules, as :class:`metakern.rules.CoordinatewiseLSTM`, step
    all coordinates of a parameter group in one launch, and a non-finite gradient affects only its own coordinates.
    Other rules see the tensors of a group by name: those of ``named_parameters()`` if the group has them, else their
    position among all parameters, "0", "1", ...

    A learned rule works for networks like those it was meta-trained on, and for as many steps, the rule's ``horizon``;
    one warning says when a parameter passes it. The shipped rule ``digits_lstm`` is for classifiers with one small
    hidden layer of sigmoid units and for 100 steps: at ``lr=1`` other networks stall or diverge, and after 100 steps
    the loss may rise. Other networks need an ``lr`` from 0.03 to 0.3, tuned as for any optimizer, with a decay.

    The state of a parameter, ``state[p]``, is its step count and the rule's tensors. For CoordinatewiseLSTM these are
    (h, c) in tiles of 32 coordinates: float64 for float64 parameters; for all others float32, 8 · L · H bytes per
    coordinate, or half of that in bfloat16 if the rule has ``bfloat16_state``. It is allocated when a parameter first
    has a gradient. If its number of coordinates changes later, ``step`` raises until ``state[p]`` is deleted.

    ``state_dict`` holds, per parameter, ``step`` and the tensors of the rule's ``export_state``, for CoordinatewiseLSTM
    ``h`` [L, numel, H] and ``c`` [L, numel, H]; and under ``"learned_optimizer"`` the format version and the rule's
    ``state_header``, for CoordinatewiseLSTM H and L. Its tensors are copies. It resumes to the same bits, and loads for
    parameters of another dtype or device, for a rule with or without ``bfloat16_state``, and with
    ``torch.load(weights_only=True)``. It does not contain the rule's weights; save those by ``rule.save_pretrained``.

    A group with ``rule=None`` is stepped by AdamW, as users of learned optimizers do for embeddings and norms. Its
    options are ``lr``, ``betas``, ``eps`` and ``weight_decay``, with the defaults of :class:`torch.optim.AdamW`; those
    of this optimizer do not apply. Its arithmetic and its state are those of ``torch.optim.AdamW``, ``fused=True``
    where torch has fused kernels.

    Args:
        params: parameters, named parameters or group dicts, as for any torch optimizer; dense float32, bfloat16,
            float16 or float64, on the device of the rule.
        rule: the update rule; optimizers may share one. Or a name: of a rule that ships with its weights, as
            ``"general"``, see :func:`metakern.rules.pretrained`, or of one without weights, as ``"adam"``, see
            :func:`metakern.rules.make`.
        lr: multiplier of the rule's update; 1 is the update as trained. A group's ``"lr"`` overrides it, and torch's
            schedulers can change it.
        weight_decay: decoupled weight decay, as in AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101): before the
            rule's update, a parameter is multiplied by 1 − lr · weight_decay. With ``lr`` 1 in place of AdamW's 0.001,
            use a value 1000 times smaller for the same decay. A group's ``"weight_decay"`` overrides it.

    Raises:
        TypeError: for a rule, parameter, learning rate or decay of another type
        ValueError: for a learning rate or decay that is negative or not finite, a parameter on another device than the
            rule or given twice, and a group with any other option

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = LearnedOptimizer(model.parameters(), "general")
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> groups = [{"params": model.weight}, {"params": model.bias, "rule": None, "lr": 1e-3, "weight_decay": 0.0}]
        >>> optimizer = LearnedOptimizer(groups, metakern.rules.load("digits_lstm"), lr=0.1)
    """

    _past_horizon = False  # whether the warning about the horizon was given

    def __init__(self, params: Iterable[Any], rule: Rule | str, lr: float = 1.0, weight_decay: float = 0.0) -> None:
        rule = trained_or_named(rule)
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a metakern.rules.Rule, got {type(rule).__name__}")
        self.rule = rule
        self.shared: dict[int, dict[str, Tensor]] = {}  # by group: state tensors shared by its parameters
        self._slots: dict[int, list[_Slot | None]] = {}
        defaults = {"lr": check_rate(lr, "lr"), "weight_decay": check_rate(weight_decay, "weight_decay")}
        super().__init__(params, defaults)
        self.register_state_dict_post_hook(to_checkpoint, prepend=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises as the constructor does; the optimizer is then unchanged."""
        if isinstance(param_group, dict) and adamw.is_adamw(param_group):
            param_group = {**adamw.DEFAULTS, **param_group}
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            self._check_group(index)
            if len(set(group["params"])) != len(group["params"]):
                raise ValueError(f"group {index} must hold each parameter once, got one twice")
            for position in range(len(group["params"])):
                self._check_param(index, position)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @not_compiled  # nothing to fuse here
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: evaluates the model, calls ``backward`` and returns the loss; runs with gradients enabled. A rule
                that chooses where gradients are taken, as HierarchicalRNN with attention, needs it: while it runs, the
                parameters are at these points.

        Returns:
            what the closure returned, or None

        Raises:
            TypeError: for a closure that is not callable, a gradient that is not dense or a parameter whose dtype
                changed to an unsupported one
            ValueError: for an option, device or number of coordinates that does not fit (any more), and for a rule that
                needs the loss, or chooses its points, without a closure

        Errors are raised before any parameter changes.
        """
        loss = None
        if closure is not None and not callable(closure):
            raise TypeError(
                f"closure must be a function that evaluates the model, calls backward and returns the loss, got "
                f"{type(closure).__name__}: for a loss call loss.backward() and then step() without it"
            )
        if closure is not None:
            with torch.enable_grad(), self._at_gradient_points():
                loss = closure()
        elif self.rule.moves_gradients:
            raise ValueError(
                f"closure must be given, as {type(self.rule).__name__} with attention chooses where the gradient is "
                "taken: a function that evaluates the model, calls backward and returns the loss"
            )
        value = loss.detach() if isinstance(loss, Tensor) and self.rule.needs_loss else None
        if self.rule.needs_loss and value is None:
            raise ValueError(
                f"closure must return the loss, a tensor, as {type(self.rule).__name__} needs it, got "
                f"{type(loss).__name__}"
            )
        indices = range(len(self.param_groups))
        by_adamw = [index for index in indices if adamw.is_adamw(self.param_groups[index])]
        plan = [launch for index in indices if index not in by_adamw for launch in self._plan(index)]
        steps_of_adamw = [self._plan_adamw(index) for index in by_adamw]
        for members, slots, lr, weight_decay in plan:
            members.step_(slots, lr, weight_decay, value)
        for adamw_step in steps_of_adamw:
            adamw_step.run()
        if self.rule.horizon is not None and not self._past_horizon:
            steps = max((slot.entry["step"] for _, slots, *_ in plan for slot in slots), default=0)
            self._check_horizon(self.rule.horizon, steps)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of :meth:`state_dict`, cast to the dtype and device of the current parameters and rule.

        Raises:
            ValueError: for anything but a complete checkpoint of this optimizer in a known format version, for a rule
                of this H and L and for parameters of these sizes; the optimizer is then unchanged.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state_dict must be a dict as state_dict() makes it, got {type(state_dict).__name__}")
        # Registered last, so that it runs after the caller's own hooks.
        handle = self.register_load_state_dict_pre_hook(from_checkpoint)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        # Clones, because pickle writes a view's whole storage.
        state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for p, entry in self.state.items():
            state[p] = {key: x.clone() if isinstance(x, Tensor) else x for key, x in entry.items()}
        return {**super().__getstate__(), "state": state, "rule": self.rule, "shared": self.shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore from unpickling, or from the base class's load_state_dict (then ``state`` has no rule)."""
        self.__dict__.setdefault("shared", {})  # missing in pickles of earlier versions
        super().__setstate__(state)
        self._slots = {}
        for entry in self.state.values():
            entry.update({key: x.tensor for key, x in entry.items() if isinstance(x, Kept)})
        if "rule" in state:  # hooks are not pickled
            self.register_state_dict_post_hook(to_checkpoint, prepend=True)

    def _check_horizon(self, horizon: int, steps: int) -> None:
        """Warn once when a parameter has taken more steps than the rule was trained for."""
        if steps > horizon:
            self._past_horizon = True
            trained_on = f", on {self.rule.trained_on}" if self.rule.trained_on else ""
            warn_user(
                f"the rule was meta-trained for {horizon} steps{trained_on}; this is step {steps}, and beyond its "
                f"horizon the loss may rise: {self.rule.advice_beyond_horizon}"
            )

    @contextmanager
    def _at_gradient_points(self) -> Iterator[None]:
        """Context with the parameters at the points where the rule wants the next gradients, and back afterwards."""
        moved = list(self._gradient_points()) if self.rule.moves_gradients else []
        kept = [p.detach().clone() for p, _ in moved]
        try:
            with torch.no_grad():
                for p, point in moved:
                    p.copy_(point)
            yield
        finally:
            with torch.no_grad():
                for (p, _), old in zip(moved, kept, strict=True):
                    p.copy_(old)

    def _gradient_points(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter that has a state, and where the rule wants its next gradient."""
        for index, group in enumerate(self.param_groups):
            if adamw.is_adamw(group):
                continue
            slots = self._slots.get(index)
            pairs = zip(group["params"], slots or (), strict=False)
            if not slots or any(s and not s.serves(p, self.state.get(p), self.rule, None) for p, s in pairs):
                slots = self._build(index)
            by_arena: dict[_Arena, list[_Slot]] = {}
            for slot in slots:
                if slot is not None:
                    by_arena.setdefault(slot.arena, []).append(slot)
            for members, of_members in by_arena.items():
                yield from zip([slot.param for slot in of_members], members.points(of_members), strict=True)

    # -------------------------------------------------------------------------------------------- what a step moves

    def _plan(self, index: int) -> Iterator[tuple[_Arena, list[_Slot], float, float]]:
        """The launches of group ``index``: each an arena, its slots with a gradient, lr and weight decay."""
        group = self.param_groups[index]
        lr, weight_decay = check_group(group, f"group {index}")
        params = group["params"]
        slots = self._slots.get(index, ())
        layout = self.rule.state_layout() if isinstance(self.rule, CoordinatewiseRule) else None
        if len(slots) != len(params) or any(
            p.grad is not None and (slot is None or not slot.serves(p, self.state.get(p), self.rule, layout))
            for p, slot in zip(params, slots, strict=True)
        ):
            slots = self._build(index)
        active: dict[_Arena, list[_Slot]] = {}
        for position, (p, slot) in enumerate(zip(params, slots, strict=True)):
            if p.grad is None or slot is None:
                continue
            check_dense_grad(p, self.name_of(index, position))
            active.setdefault(slot.arena, []).append(slot)
        device = self.rule.device
        for members, of_group in active.items():
            if device is not None and members.device != device:
                raise ValueError(
                    f"rule must be on the device of the parameters of group {index}, {members.device}, got {device}"
                )
            yield members, of_group, lr, weight_decay

    def _plan_adamw(self, index: int) -> adamw.AdamWStep:
        """The step of group ``index`` by AdamW."""
        group = self.param_groups[index]
        options = adamw.check_options(group, f"group {index}")
        params: list[Tensor] = []
        for position, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            self._check_param(index, position)
            check_dense_grad(p, self.name_of(index, position))
            adamw.prepare_entry(self.state[p], p, self.name_of(index, position))
            params.append(p)
        return adamw.AdamWStep(params, [self.state[p] for p in params], options)

    def _check_group(self, index: int) -> None:
        """Check the options of group ``index``."""
        group, name = self.param_groups[index], f"group {index}"
        if adamw.is_adamw(group):
            adamw.check_options(group, name)
        else:
            check_group(group, name)

    def _build(self, index: int) -> list[_Slot | None]:
        """Build arenas for the parameters of group ``index`` that have a gradient or a state, and move the state in."""
        params = self.param_groups[index]["params"]
        wide = isinstance(self.rule, CoordinatewiseRule)
        kinds: dict[Any, list[int]] = {}
        for position, p in enumerate(params):
            entry = self.state.get(p)
            if p.grad is None and not entry:
                continue
            self._check_param(index, position)
            if entry:
                self._check_state(entry, index, position)
            kinds.setdefault((p.dtype, p.device) if wide else p.device, []).append(position)
        slots: list[_Slot | None] = [None] * len(params)
        for positions in kinds.values():
            members = [params[position] for position in positions]
            if isinstance(self.rule, CoordinatewiseRule):
                of_members: _Arena = arena.Arena(self.rule, members)
            else:
                named = {self._rule_name(index, position): params[position] for position in positions}
                of_members = tensorwise.Tensorwise(self.rule, named, self.shared.setdefault(index, {}))
            for position, p, slot in zip(positions, members, of_members.slots(members), strict=True):
                slot.adopt(self.state[p])
                slots[position] = slot
        self._slots[index] = slots
        return slots

    def _check_state(self, entry: dict[str, Any], index: int, position: int) -> None:
        """Raise ValueError where a parameter's state belongs to another rule or has another size."""
        p, name = self.param_groups[index]["params"][position], self.name_of(index, position)
        if entry["numel"] != p.numel():
            raise ValueError(
                f"{name} must keep the {entry['numel']} coordinates that its state has, got {p.numel()}; delete "
                "optimizer.state[parameter] to let it start anew"
            )
        if isinstance(self.rule, CoordinatewiseRule):
            arena.check_state(self.rule, entry, name)
        else:
            tensorwise.check_state(self.rule, entry, p, name)

    def _check_param(self, index: int, position: int) -> None:
        group = self.param_groups[index]
        p, device = group["params"][position], None if adamw.is_adamw(group) else self.rule.device
        if p.dtype not in DTYPES or p.layout != torch.strided:
            what = p.dtype if p.layout == torch.strided else p.layout
            raise TypeError(
                f"{self.name_of(index, position)} must be dense and float32, bfloat16, float16 or float64, got {what}"
            )
        if device is not None and p.device != device:
            raise ValueError(
                f"{self.name_of(index, position)} must be on the device of the rule, {device}, got {p.device}"
            )

    def name_of(self, index: int, position: int) -> str:
        """A parameter's name in messages."""
        group = self.param_groups[index]
        shape = list(group["params"][position].shape)
        if "param_names" in group:
            return f"parameter {group['param_names'][position]!r} {shape}"
        return f"parameter {position} of group {index} {shape}"

    def _rule_name(self, index: int, position: int) -> str:
        """A parameter's name for the rule."""
        group = self.param_groups[index]
        if "param_names" in group:
            return str(group["param_names"][position])
        return str(sum(len(other["params"]) for other in self.param_groups[:index]) + position)
