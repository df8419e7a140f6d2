"""Checkpoints of LearnedOptimizer: their format, and validation on loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.optim import Optimizer

from metakern.optim import adamw
from metakern.optim.groups import check_group
from metakern.rules import Rule
from metakern.rules.protocol import check_saved

if TYPE_CHECKING:
    from metakern.optim.learned_optimizer import LearnedOptimizer

#: Format version written by ``state_dict``. Version 1, without weight decay, can also be loaded.
FORMAT_VERSION = 2

#: Version with groups of AdamW, which earlier releases cannot load; written only where there are such groups.
ADAMW_VERSION = 3

#: Key in a state_dict that marks checkpoints of this optimizer.
HEADER = "learned_optimizer"

#: Header key: tensors shared by all states of a group, by group index.
_SHARED = "shared"


@dataclass(frozen=True)
class Kept:
    """Wraps a tensor so that the base class's load_state_dict does not cast it to the parameter's dtype."""

    tensor: Tensor


def to_checkpoint(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Post-hook of state_dict: the state in its portable form, copied, and the header.

    Tensors keep the state's dtype: bfloat16 stored as float32 would resume to the same bits, but double the file.
    """
    optimizer, state = cast("LearnedOptimizer", optimizer), {}
    groups = state_dict["param_groups"]
    by_adamw = {key for group in groups if adamw.is_adamw(group) for key in group["params"]}
    for key, entry in state_dict["state"].items():
        if entry and key in by_adamw:
            state[key] = adamw.export_entry(entry)
        elif entry:  # reading state[p] creates an empty entry
            tensors = {name: x for name, x in entry.items() if isinstance(x, Tensor)}
            exported = optimizer.rule.export_state(tensors, entry["numel"])
            state[key] = {"step": entry["step"], **_copies(exported)}
    header = _header(optimizer.rule)
    if any(map(adamw.is_adamw, groups)):
        header["format_version"] = ADAMW_VERSION
    shared = {index: _copies(tensors) for index, tensors in optimizer.shared.items() if tensors}
    return {**state_dict, "state": state, HEADER: {**header, _SHARED: shared} if shared else header}


def from_checkpoint(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Pre-hook of load_state_dict: check everything, then pack the state."""
    optimizer = cast("LearnedOptimizer", optimizer)
    for key, kind in (("state", Mapping), ("param_groups", Sequence), (HEADER, Mapping)):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(
                f"state_dict must be a checkpoint of LearnedOptimizer with the keys 'state', 'param_groups' and "
                f"{HEADER!r}, got {type(state_dict[key]).__name__ if key in state_dict else 'nothing'} for {key!r}"
            )
    version = state_dict[HEADER].get("format_version")
    if version not in (1, FORMAT_VERSION, ADAMW_VERSION):
        raise ValueError(f"state_dict must have format_version 1, {FORMAT_VERSION} or {ADAMW_VERSION}, got {version!r}")
    for key, expected in _header(optimizer.rule).items():
        if key != "format_version" and state_dict[HEADER].get(key) != expected:
            raise ValueError(f"state_dict must have {key} {expected}, got {state_dict[HEADER].get(key)!r}")
    groups = _match_groups(optimizer, state_dict["param_groups"], version)
    names = _names(optimizer, groups)
    by_adamw = {key for group in groups if adamw.is_adamw(group) for key in group["params"]}
    state = {}
    for key, entry in state_dict["state"].items():
        if key not in names:
            raise ValueError(f"state of {key!r} must belong to a parameter of 'param_groups', {sorted(names)}")
        param, name = names[key]
        _check_entry(entry, name)
        import_state = adamw.import_entry if key in by_adamw else optimizer.rule.import_state
        kept = {name: Kept(x) for name, x in import_state(entry, param, name).items()}
        state[key] = {"step": entry["step"], "numel": param.numel(), **kept}
    optimizer.shared = _shared(optimizer, state_dict[HEADER].get(_SHARED, {}))
    return {**state_dict, "param_groups": groups, "state": state}


def _shared(optimizer: LearnedOptimizer, saved: Any) -> dict[int, dict[str, Tensor]]:
    """The checked shared tensors of each group."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"state_dict must have {_SHARED} by group, got {type(saved).__name__}")
    found: dict[int, dict[str, Tensor]] = {}
    for index, tensors in saved.items():
        known = index in range(len(optimizer.param_groups)) and not adamw.is_adamw(optimizer.param_groups[index])
        if not known or not isinstance(tensors, Mapping):
            raise ValueError(f"state_dict must have {_SHARED} tensors of its groups, got {tensors!r} for {index!r}")
        first = optimizer.param_groups[index]["params"][0]
        like = optimizer.rule.init_state({"": first.detach()}).shared
        found[index] = {k: check_saved(tensors, k, x, f"group {index}").to(x).clone() for k, x in like.items()}
    return found


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.contiguous().clone() for name, x in tensors.items()}


def _header(rule: Rule) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, **rule.state_header()}


def _match_groups(optimizer: LearnedOptimizer, saved: Sequence[Any], version: int) -> list[dict[str, Any]]:
    """The saved groups, upgraded to this version's options; ValueError where they do not match the optimizer's."""
    groups = optimizer.param_groups
    of_rule = ("params", "lr") if version == 1 else ("params", "lr", "weight_decay")
    if len(saved) != len(groups):
        raise ValueError(f"state_dict must have {len(groups)} parameter groups, got {len(saved)}")
    matched = []
    for index, (group, other) in enumerate(zip(groups, saved, strict=True)):
        keys = ("params", *adamw.DEFAULTS) if adamw.is_adamw(group) else of_rule
        if not isinstance(other, Mapping) or any(key not in other for key in keys):
            got = list(other) if isinstance(other, Mapping) else type(other).__name__
            raise ValueError(f"group {index} of state_dict must be a dict with the keys {keys}, got {got}")
        saved_params = other["params"]
        count = len(saved_params) if isinstance(saved_params, Sequence) else repr(saved_params)
        if count != len(group["params"]):
            raise ValueError(f"group {index} of state_dict must have {len(group['params'])} parameters, got {count}")
        name = f"group {index} of state_dict"
        if adamw.is_adamw(other) != adamw.is_adamw(group):
            kinds = [f"{'rule=None, AdamW' if adamw.is_adamw(each) else 'the rule'}" for each in (group, other)]
            raise ValueError(f"{name} must be stepped by {kinds[0]}, as the optimizer's, got {kinds[1]}")
        matched.append({"weight_decay": 0.0, **other})
        try:
            if adamw.is_adamw(group):
                adamw.check_options(other, name)
            else:
                check_group(matched[-1], name)
        except TypeError as error:
            raise ValueError(str(error)) from error
    return matched


def _names(optimizer: LearnedOptimizer, saved: Sequence[Mapping[str, Any]]) -> dict[Any, tuple[Tensor, str]]:
    """Parameter and name by parameter id in the saved groups."""
    names: dict[Any, tuple[Tensor, str]] = {}
    for index, (group, other) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        for position, (key, p) in enumerate(zip(other["params"], group["params"], strict=True)):
            names[key] = (p, optimizer.name_of(index, position))
    return names


def _check_entry(entry: Any, name: str) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(f"state of {name} must be a dict, got {type(entry).__name__}")
    if type(entry.get("step")) is not int or entry["step"] < 0:
        raise ValueError(f"step of {name} must be an integer of at least 0, got {entry.get('step')!r}")
