"""LearnedOptimizer: an update rule as a :class:`torch.optim.Optimizer`.

Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent", arXiv 1606.04474.

Axis legend: N coordinates, H hidden units, L layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metakern.core.memo import outside_modes
from metakern.core.warn import warn_user
from metakern.ops import LSTMState
from metakern.ops.lstm_step import PARAM_DTYPES
from metakern.ops.lstm_step.state import TILE_LANES, tiles
from metakern.optim.checkpoints import FORMAT_VERSION as FORMAT_VERSION
from metakern.optim.checkpoints import HEADER as HEADER
from metakern.optim.checkpoints import from_checkpoint, to_checkpoint
from metakern.optim.groups import check_group, check_rate
from metakern.rules import CoordinatewiseLSTM


class LearnedOptimizer(Optimizer):
    """Trains a model with a learned update rule; the rule itself stays as it is.

    θ' = (1 − lr · weight_decay) · θ + lr · rule(∇θ, state), for every coordinate of a parameter group in one launch. A
    parameter whose ``grad`` is None is skipped: neither it nor its state moves, nor does it decay. A gradient that is
    not finite spoils its own coordinates only.

    A learned rule serves networks like those that it was meta-trained on, for as many steps, the rule's ``horizon``;
    one warning says when a parameter passes it. ``digits_lstm``, which ships, is for classifiers with one small hidden
    layer of sigmoid units and for 100 steps: at ``lr=1`` other networks stall or diverge, and beyond them the loss may
    rise. Other networks want an ``lr`` from 0.03 to 0.3, tuned as for any optimizer, that a scheduler lets decay.

    The state of a parameter, ``state[p]``, is its step count and the rule's (h, c), in tiles of 32 coordinates: float64
    for float64 parameters; for all others float32, 8 · L · H bytes a coordinate, or half of that in bfloat16 if the
    rule has ``bfloat16_state``. Memory is taken when a parameter first has a gradient. If its number of coordinates
    changes later, ``step`` raises until ``state[p]`` is deleted.

    ``state_dict`` holds, per parameter, ``step``, ``h`` [L, numel, H] and ``c`` [L, numel, H], and under
    ``"learned_optimizer"`` the format version, H and L. It holds copies, resumes to the same bits, loads for parameters
    of another dtype or device and for a rule with or without ``bfloat16_state``, and with
    ``torch.load(weights_only=True)``. The rule's weights are not part of it: they have ``rule.save_pretrained``.

    Args:
        params: parameters, named parameters or group dicts, as for any torch optimizer; dense float32, bfloat16,
            float16 or float64, on the device of the rule.
        rule: the update rule; optimizers may share one.
        lr: multiplier of the update, 1 for what the rule was trained to do; a group's ``"lr"`` replaces it, and torch's
            schedulers drive it.
        weight_decay: decoupled weight decay, as in AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101): before the
            rule's update, a step takes lr · weight_decay of a parameter away. As ``lr`` is 1 where AdamW's is 0.001,
            the same decay is a number 1000 times smaller. A group's ``"weight_decay"`` replaces it.

    Raises:
        TypeError: for a rule, parameter, learning rate or decay of another type
        ValueError: for a learning rate or decay that is negative or not finite, a parameter that is not on the rule's
            device or that is given twice, and a group with another option than these two

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = LearnedOptimizer(model.parameters(), CoordinatewiseLSTM())
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
    """

    _past_horizon = False  # whether a step beyond the rule's horizon was warned of

    def __init__(
        self, params: Iterable[Any], rule: CoordinatewiseLSTM, lr: float = 1.0, weight_decay: float = 0.0
    ) -> None:
        if not isinstance(rule, CoordinatewiseLSTM):
            raise TypeError(f"rule must be a metakern.rules.CoordinatewiseLSTM, got {type(rule).__name__}")
        self.rule = rule
        self._slots: dict[int, list[_Slot | None]] = {}
        defaults = {"lr": check_rate(lr, "lr"), "weight_decay": check_rate(weight_decay, "weight_decay")}
        super().__init__(params, defaults)
        self.register_state_dict_post_hook(to_checkpoint, prepend=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; errors are those of the constructor and leave the optimizer as it was."""
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            check_group(group, f"group {index}")
            if len(set(group["params"])) != len(group["params"]):
                raise ValueError(f"group {index} must hold each parameter once, got one twice")
            for position in range(len(group["params"])):
                self._check_param(index, position)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch._disable_dynamo  # type: ignore[attr-defined]  # nothing to fuse: a compiled training step calls it as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: evaluates the model again, calls ``backward`` and returns the loss; runs with gradients enabled.

        Returns:
            what the closure returned, or None

        Raises:
            TypeError: for a closure that is no function, a gradient that is not dense or a parameter whose dtype became
                one that no kernel serves
            ValueError: for an option, device or number of coordinates that does not fit (any more)

        Errors come before the first parameter moves.
        """
        loss = None
        if closure is not None and not callable(closure):
            raise TypeError(
                f"closure must be a function that evaluates the model, calls backward and returns the loss, got "
                f"{type(closure).__name__}: for a loss call loss.backward() and then step() without it"
            )
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = [launch for index in range(len(self.param_groups)) for launch in self._plan(index)]
        for arena, slots, lr, weight_decay in plan:
            arena.step_(self.rule, slots, lr, weight_decay)
        if self.rule.horizon is not None and not self._past_horizon:
            steps = max((slot.entry["step"] for _, slots, *_ in plan for slot in slots), default=0)
            self._check_horizon(self.rule.horizon, steps)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` made; the state takes the dtype and device that fit parameters and rule now.

        Raises:
            ValueError: for anything but a whole checkpoint of this optimizer, of this format version, for a rule of
                this H and L and for parameters of these sizes; the optimizer is unchanged then.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"state_dict must be a dict as state_dict() makes it, got {type(state_dict).__name__}")
        # Registered last, so that it sees what the caller's own hooks made of the checkpoint.
        handle = self.register_load_state_dict_pre_hook(from_checkpoint)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        # Clones, because pickle writes a view with all the memory that it views.
        state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for p, entry in self.state.items():
            state[p] = {**entry, "lstm": entry["lstm"].clone()} if entry else {}
        return {**super().__getstate__(), "state": state, "rule": self.rule}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state from unpickling, or from load_state_dict of the base class, then without a rule."""
        super().__setstate__(state)
        self._slots = {}
        for entry in self.state.values():
            if isinstance(entry.get("lstm"), LSTMState):
                entry["lstm"] = entry["lstm"].data
        if "rule" in state:  # hooks are not part of what is pickled
            self.register_state_dict_post_hook(to_checkpoint, prepend=True)

    def _check_horizon(self, horizon: int, steps: int) -> None:
        """Warn once where a parameter has taken more steps than the rule was trained for."""
        if steps > horizon:
            self._past_horizon = True
            trained_on = f", on {self.rule.trained_on}" if self.rule.trained_on else ""
            warn_user(
                f"the rule was meta-trained for {horizon} steps{trained_on}; this is step {steps}, and beyond its "
                "horizon the loss may rise: let a scheduler decay lr, and start other networks at an lr of 0.03 to 0.3"
            )

    # -------------------------------------------------------------------------------------------- what a step moves

    def _plan(self, index: int) -> Iterator[tuple[_Arena, list[_Slot], float, float]]:
        """The launches that group ``index`` needs: an arena, the slots in it that have a gradient, lr, weight decay."""
        group = self.param_groups[index]
        lr, weight_decay = check_group(group, f"group {index}")
        params = group["params"]
        slots = self._slots.get(index, ())
        if len(slots) != len(params) or any(
            p.grad is not None and (slot is None or not slot.serves(p, self.state.get(p), self.rule))
            for p, slot in zip(params, slots, strict=True)
        ):
            slots = self._build(index)
        active: dict[_Arena, list[_Slot]] = {}
        for position, (p, slot) in enumerate(zip(params, slots, strict=True)):
            if p.grad is None or slot is None:
                continue
            if p.grad.layout != torch.strided:
                raise TypeError(
                    f"gradient of {self.name_of(index, position)} must be dense, got {p.grad.layout}: make its "
                    "nn.Embedding with sparse=False, or let p.grad = p.grad.to_dense() before the step"
                )
            active.setdefault(slot.arena, []).append(slot)
        for arena, members in active.items():
            if arena.params.device != self.rule.head.weight.device:
                raise ValueError(
                    f"rule must be on the device of the parameters of group {index}, {arena.params.device}, "
                    f"got {self.rule.head.weight.device}"
                )
            yield arena, members, lr, weight_decay

    def _build(self, index: int) -> list[_Slot | None]:
        """New arenas for the parameters of group ``index`` that have a gradient or a state; the state moves there."""
        params = self.param_groups[index]["params"]
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for position, p in enumerate(params):
            entry = self.state.get(p)
            if p.grad is None and not entry:
                continue
            self._check_param(index, position)
            if entry and entry["lstm"].shape[1:4:2] != (self.rule.num_layers, self.rule.hidden_size):
                raise ValueError(
                    f"rule must have the layers and hidden units of the state of {self.name_of(index, position)}, "
                    f"{list(entry['lstm'].shape[1:4:2])}, got {[self.rule.num_layers, self.rule.hidden_size]}"
                )
            if entry and entry["numel"] != p.numel():
                raise ValueError(
                    f"{self.name_of(index, position)} must keep the {entry['numel']} coordinates that its state has, "
                    f"got {p.numel()}; delete optimizer.state[parameter] to let it start anew"
                )
            kinds.setdefault((p.dtype, p.device), []).append(position)
        slots: list[_Slot | None] = [None] * len(params)
        for positions in kinds.values():
            members = [params[position] for position in positions]
            arena = _Arena(self.rule, members)
            for position, p, slot in zip(positions, members, arena.slots(members), strict=True):
                slot.adopt(self.state[p])
                slots[position] = slot
        self._slots[index] = slots
        return slots

    def _check_param(self, index: int, position: int) -> None:
        p, device = self.param_groups[index]["params"][position], self.rule.head.weight.device
        if p.dtype not in PARAM_DTYPES or p.layout != torch.strided:
            what = p.dtype if p.layout == torch.strided else p.layout
            raise TypeError(
                f"{self.name_of(index, position)} must be dense and float32, bfloat16, float16 or float64, got {what}"
            )
        if p.device != device:
            raise ValueError(
                f"{self.name_of(index, position)} must be on the device of the rule, {device}, got {p.device}"
            )

    def name_of(self, index: int, position: int) -> str:
        """How messages call a parameter."""
        group = self.param_groups[index]
        shape = list(group["params"][position].shape)
        if "param_names" in group:
            return f"parameter {group['param_names'][position]!r} {shape}"
        return f"parameter {position} of group {index} {shape}"


# ------------------------------------------------------------------------------------------------------------ arena


@dataclass(eq=False, slots=True)
class _Slot:
    """The place of one parameter in an arena: whole tiles, so that its state is a contiguous slice of the arena's."""

    arena: _Arena
    param: Tensor
    first: int  # tile
    last: int  # tile behind the last
    params: Tensor  # view of the arena's in the shape of the parameter; likewise grads
    grads: Tensor
    state: Tensor  # view [last - first, L, 2, H, 32]
    entry: dict[str, Any]  # state[param] of the optimizer

    def serves(self, p: Tensor, entry: dict[str, Any] | None, rule: CoordinatewiseLSTM) -> bool:
        """Whether nothing changed since the slot was made: the parameter's kind and shape, its state, the rule's."""
        view = self.params
        return (
            self.param is p
            and self.entry is entry
            and self.entry.get("lstm") is self.state
            and view.shape == p.shape
            and view.dtype == p.dtype
            and view.device == p.device
            and self.arena.bfloat16_state == rule.bfloat16_state
        )

    def adopt(self, entry: dict[str, Any]) -> None:
        """Move the state of ``entry`` in, casting it, or start at zero; ``entry`` then shows this slot's memory."""
        if entry:
            self.state.copy_(entry["lstm"])
        else:
            entry.update(step=0, numel=self.param.numel())
        entry["lstm"] = self.state
        self.entry = entry


class _Arena:
    """Flat parameters, flat gradients and packed state of parameters of one dtype and device, one slot after another.

    Lanes between a parameter's last coordinate and the end of its last tile compute on zeros and are never read.
    """

    def __init__(self, rule: CoordinatewiseLSTM, members: Sequence[Tensor]) -> None:
        self.count = len(members)
        with outside_modes():  # they are kept for later steps
            self.params = members[0].new_zeros(sum(tiles(p.numel()) for p in members) * TILE_LANES, requires_grad=False)
            self.grads = torch.zeros_like(self.params)
            self.state = rule.init_state(self.params)
        self.bfloat16_state = rule.bfloat16_state

    def slots(self, members: Iterable[Tensor]) -> Iterator[_Slot]:
        """One for each of the constructor's members, in order. The arena keeps none: a cycle would keep its memory."""
        first = 0
        for p in members:
            last, start = first + tiles(p.numel()), first * TILE_LANES
            params, grads = (x[start : start + p.numel()].view(p.shape) for x in (self.params, self.grads))
            yield _Slot(self, p, first, last, params, grads, self.state.data[first:last], {})
            first = last

    def step_(self, rule: CoordinatewiseLSTM, slots: Sequence[_Slot], lr: float, weight_decay: float) -> None:
        """Update the parameters of ``slots``, which are in order: one launch for each run of neighbours."""
        params = [slot.param for slot in slots]
        views = [slot.params for slot in slots]
        torch._foreach_copy_(views, params)
        if weight_decay:
            torch._foreach_mul_(views, 1 - lr * weight_decay)
        torch._foreach_copy_([slot.grads for slot in slots], [p.grad for p in params if p.grad is not None])
        if len(slots) == self.count:
            rule.step_(self.params, self.grads, self.state, lr)
        else:
            for first, last in _runs(slots):
                lanes = slice(first * TILE_LANES, last * TILE_LANES)
                state = LSTMState(self.state.data[first:last], (last - first) * TILE_LANES)
                rule.step_(self.params[lanes], self.grads[lanes], state, lr)
        torch._foreach_copy_(params, views)
        for slot in slots:
            slot.entry["step"] += 1


def _runs(slots: Sequence[_Slot]) -> Iterator[tuple[int, int]]:
    """Ranges of tiles that neighbouring slots cover."""
    first, last = slots[0].first, slots[0].last
    for slot in slots[1:]:
        if slot.first != last:
            yield first, last
            first = slot.first
        last = slot.last
    yield first, last
