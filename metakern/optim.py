"""LearnedOptimizer: an update rule as a :class:`torch.optim.Optimizer`.

Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent", arXiv 1606.04474.

Axis legend: N coordinates, H hidden units, L layers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from metakern._memo import outside_modes
from metakern.ops import LSTMState, pack_state, unpack_state
from metakern.ops.lstm_state import TILE_LANES, tiles
from metakern.ops.lstm_step import PARAM_DTYPES
from metakern.rules import CoordinatewiseLSTM

#: Version of the checkpoint that ``state_dict`` makes; another one is refused.
FORMAT_VERSION = 1

#: The key of a state_dict that tells a checkpoint of this optimizer from any other.
HEADER = "learned_optimizer"

_GROUP_KEYS = ("params", "lr")
_ENTRY_KEYS = ("step", "h", "c")
_SAVED_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class LearnedOptimizer(Optimizer):
    """Trains a model with a learned update rule; the rule itself stays as it is.

    θ' = θ + lr · rule(∇θ, state), for every coordinate of a parameter group in one launch. A parameter whose ``grad``
    is None is skipped: neither it nor its state moves. A gradient that is not finite spoils its own coordinates only.

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
        lr: multiplier of the update; a group's ``"lr"`` replaces it, and torch's schedulers drive it.

    Raises:
        TypeError: for a rule, parameter or learning rate of another type
        ValueError: for a learning rate that is negative or not finite, a parameter that is not on the rule's device or
            that is given twice

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = LearnedOptimizer(model.parameters(), CoordinatewiseLSTM())
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
    """

    def __init__(self, params: Iterable[Any], rule: CoordinatewiseLSTM, lr: float = 1.0) -> None:
        if not isinstance(rule, CoordinatewiseLSTM):
            raise TypeError(f"rule must be a metakern.rules.CoordinatewiseLSTM, got {type(rule).__name__}")
        self.rule = rule
        self._slots: dict[int, list[_Slot | None]] = {}
        super().__init__(params, {"lr": _checked_lr(lr, "lr")})
        self.register_state_dict_post_hook(_to_checkpoint, prepend=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; errors are those of the constructor and leave the optimizer as it was."""
        super().add_param_group(param_group)
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        try:
            _checked_lr(group["lr"], f"lr of group {index}")
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
            TypeError: for a gradient that is not dense or a parameter whose dtype became one that no kernel serves
            ValueError: for a learning rate, device or number of coordinates that does not fit (any more)

        Errors come before the first parameter moves.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = [launch for index in range(len(self.param_groups)) for launch in self._plan(index)]
        for arena, slots, lr in plan:
            arena.step_(self.rule, slots, lr)
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
        handle = self.register_load_state_dict_pre_hook(_from_checkpoint)
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
            self.register_state_dict_post_hook(_to_checkpoint, prepend=True)

    # -------------------------------------------------------------------------------------------- what a step moves

    def _plan(self, index: int) -> Iterator[tuple[_Arena, list[_Slot], float]]:
        """The launches that group ``index`` needs: an arena, the slots in it that have a gradient, the multiplier."""
        group = self.param_groups[index]
        lr = _checked_lr(group["lr"], f"lr of group {index}")
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
                raise TypeError(f"gradient of {self._name(index, position)} must be dense, got {p.grad.layout}")
            active.setdefault(slot.arena, []).append(slot)
        for arena, members in active.items():
            if arena.params.device != self.rule.head.weight.device:
                raise ValueError(
                    f"rule must be on the device of the parameters of group {index}, {arena.params.device}, "
                    f"got {self.rule.head.weight.device}"
                )
            yield arena, members, lr

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
                    f"rule must have the layers and hidden units of the state of {self._name(index, position)}, "
                    f"{list(entry['lstm'].shape[1:4:2])}, got {[self.rule.num_layers, self.rule.hidden_size]}"
                )
            if entry and entry["numel"] != p.numel():
                raise ValueError(
                    f"{self._name(index, position)} must keep the {entry['numel']} coordinates that its state has, "
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
                f"{self._name(index, position)} must be dense and float32, bfloat16, float16 or float64, got {what}"
            )
        if p.device != device:
            raise ValueError(
                f"{self._name(index, position)} must be on the device of the rule, {device}, got {p.device}"
            )

    def _name(self, index: int, position: int) -> str:
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

    def step_(self, rule: CoordinatewiseLSTM, slots: Sequence[_Slot], lr: float) -> None:
        """Update the parameters of ``slots``, which are in order: one launch for each run of neighbours."""
        params = [slot.param for slot in slots]
        views = [slot.params for slot in slots]
        torch._foreach_copy_(views, params)
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


# ------------------------------------------------------------------------------------------------------- checkpoint


def _to_checkpoint(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Post-hook of state_dict: the state in its portable form, copied, and the header.

    h and c keep the dtype of the state: as float32, bfloat16 would resume to the same bits too, from twice the file.
    """
    assert isinstance(optimizer, LearnedOptimizer)
    state = {}
    for key, entry in state_dict["state"].items():
        if entry:  # looking at state[p] leaves an empty entry
            h, c = (x.contiguous().clone() for x in unpack_state(LSTMState(entry["lstm"], entry["numel"])))
            state[key] = {"step": entry["step"], "h": h, "c": c}
    return {**state_dict, "state": state, HEADER: _header(optimizer.rule)}


def _from_checkpoint(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Pre-hook of load_state_dict: check everything, then pack the state."""
    assert isinstance(optimizer, LearnedOptimizer)
    for key, kind in (("state", Mapping), ("param_groups", Sequence), (HEADER, Mapping)):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(
                f"state_dict must be a checkpoint of LearnedOptimizer with the keys 'state', 'param_groups' and "
                f"{HEADER!r}, got {type(state_dict[key]).__name__ if key in state_dict else 'nothing'} for {key!r}"
            )
    for key, expected in _header(optimizer.rule).items():
        if state_dict[HEADER].get(key) != expected:
            raise ValueError(f"state_dict must have {key} {expected}, got {state_dict[HEADER].get(key)!r}")
    names = _match_groups(optimizer, state_dict["param_groups"])
    state = {}
    for key, entry in state_dict["state"].items():
        if key not in names:
            raise ValueError(f"state of {key!r} must belong to a parameter of 'param_groups', {sorted(names)}")
        param, name = names[key]
        _check_entry(entry, name, (optimizer.rule.num_layers, param.numel(), optimizer.rule.hidden_size))
        like = optimizer.rule.init_state(param.new_empty(0)).data
        # An LSTMState passes the base class untouched, which would cast a tensor to the dtype of the parameter.
        packed = pack_state(entry["h"].detach().to(like), entry["c"].detach().to(like))
        state[key] = {"step": entry["step"], "numel": param.numel(), "lstm": packed}
    return {**state_dict, "state": state}


def _header(rule: CoordinatewiseLSTM) -> dict[str, int]:
    return {"format_version": FORMAT_VERSION, "hidden_size": rule.hidden_size, "num_layers": rule.num_layers}


def _match_groups(optimizer: LearnedOptimizer, saved: Sequence[Any]) -> dict[Any, tuple[Tensor, str]]:
    """The parameter and its name for each id that the saved groups hold; ValueError where they do not match."""
    groups = optimizer.param_groups
    if len(saved) != len(groups):
        raise ValueError(f"state_dict must have {len(groups)} parameter groups, got {len(saved)}")
    names: dict[Any, tuple[Tensor, str]] = {}
    for index, (group, other) in enumerate(zip(groups, saved, strict=True)):
        if not isinstance(other, Mapping) or any(key not in other for key in _GROUP_KEYS):
            got = list(other) if isinstance(other, Mapping) else type(other).__name__
            raise ValueError(f"group {index} of state_dict must be a dict with the keys {_GROUP_KEYS}, got {got}")
        saved_params = other["params"]
        count = len(saved_params) if isinstance(saved_params, Sequence) else repr(saved_params)
        if count != len(group["params"]):
            raise ValueError(f"group {index} of state_dict must have {len(group['params'])} parameters, got {count}")
        try:
            _checked_lr(other["lr"], f"lr of group {index} of state_dict")
        except TypeError as error:
            raise ValueError(str(error)) from error
        for position, (key, p) in enumerate(zip(saved_params, group["params"], strict=True)):
            names[key] = (p, optimizer._name(index, position))
    return names


def _check_entry(entry: Any, name: str, shape: tuple[int, int, int]) -> None:
    if not isinstance(entry, Mapping) or any(key not in entry for key in _ENTRY_KEYS):
        got = list(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise ValueError(f"state of {name} must be a dict with the keys {_ENTRY_KEYS}, got {got}")
    if type(entry["step"]) is not int or entry["step"] < 0:
        raise ValueError(f"step of {name} must be an integer of at least 0, got {entry['step']!r}")
    for key in ("h", "c"):
        value = entry[key]
        is_tensor = isinstance(value, Tensor)
        if not is_tensor or value.dtype not in _SAVED_DTYPES or value.layout != torch.strided or value.shape != shape:
            got = f"{value.dtype} {value.layout} {list(value.shape)}" if is_tensor else type(value).__name__
            raise ValueError(
                f"{key} of {name} must be dense float32, float64 or bfloat16 [L, numel, H] = {list(shape)}, got {got}"
            )


def _checked_lr(lr: Any, name: str) -> float:
    """``lr`` as a number; TypeError or ValueError if it is none, negative or not finite."""
    if not isinstance(lr, (Real, Tensor)) or (isinstance(lr, Tensor) and lr.numel() != 1):
        raise TypeError(f"{name} must be a number, got {lr!r}")
    value = float(lr)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return value
