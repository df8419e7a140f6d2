"""Settings of a training as names and values, to compare with a checkpoint's and between processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metakern.core.plain_data import LIST_ENTRIES
from metakern.core.text import quoted, shortened

#: Optimizer options that a schedule changes; a checkpoint restores them.
_RATES = frozenset({"lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"})

#: Options of a step's implementation, which do not change its result.
_RUNTIME = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable"})

#: A scheduler's counters, as opposed to its options.
_COUNTERS = frozenset({"last_epoch", "base_lrs", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"})

_SCALARS = (bool, int, float, str, type(None))

#: Attributes that may differ between processes of one run.
_OWN = frozenset({"training", "rank", "local_rank", "device"})

Identity = dict[str, Any]


def identity_of(optimizer: torch.optim.Optimizer, scheduler: Any, learner: nn.Module) -> Identity:
    """Classes and initial options of optimizer and scheduler, as plain data."""
    names = {id(p): name for name, p in learner.named_parameters()}
    groups = [
        {"parameters": [names[id(p)] for p in group["params"]], "options": _options(group)}
        for group in optimizer.param_groups
    ]
    schedule = {} if scheduler is None else _schedule(scheduler.state_dict())
    return {
        "optimizer": _class_name(optimizer),
        "groups": groups,
        "scheduler": None if scheduler is None else _class_name(scheduler),
        "schedule": schedule,
    }


def identity_in(state: Mapping[str, Any], own: Identity) -> Identity:
    """Reconstruct the identity of an older checkpoint without one: the optimizer's options, but no class.

    A schedule may have changed momentum and betas, so these are taken from ``own``.
    """
    moved = {"momentum", "betas"} if own["scheduler"] is not None else set()
    groups = []
    for index, group in enumerate(state["optimizer"]["param_groups"]):
        here = own["groups"][index] if index < len(own["groups"]) else {"parameters": [], "options": {}}
        kept = {name: value for name, value in here["options"].items() if name in moved}
        groups.append({"parameters": here["parameters"], "options": _options(group) | kept})
    return {**own, "groups": groups}


def differences(saved: Identity, own: Identity) -> list[str]:
    """Describe the differences between a checkpoint's identity and this training's."""
    for part in ("optimizer", "scheduler"):
        if (saved[part] is None) == (own[part] is None) and not _same_class(saved[part], own[part]):
            return [f"{part} {_shown(saved[part], own[part])}, this training has {_shown(own[part], saved[part])}"]
    if len(saved["groups"]) != len(own["groups"]):
        return [f"{len(saved['groups'])} parameter groups of the optimizer, this training has {len(own['groups'])}"]
    found = []
    for index, (there, here) in enumerate(zip(saved["groups"], own["groups"], strict=True)):
        where = f"{own['optimizer'].rpartition('.')[2]}'s " + (f"group {index}'s " if len(own["groups"]) > 1 else "")
        if there["parameters"] != here["parameters"]:
            saved_names, own_names = quoted(list(there["parameters"])), quoted(here["parameters"])
            found.append(f"{where}parameters {saved_names}, this training has {own_names}")
        found += _differing(there["options"], here["options"], where)
    if saved["scheduler"] is not None and own["scheduler"] is not None:
        found += _differing(saved["schedule"], own["schedule"], "the schedule's ")
    return found


def _differing(saved: Mapping[str, Any], own: Mapping[str, Any], where: str) -> list[str]:
    nothing = object()

    def shown(value: Any) -> str:
        return "none" if value is nothing else quoted(value)

    pairs = [(name, saved.get(name, nothing), own.get(name, nothing)) for name in sorted({*saved, *own})]
    return [f"{where}{name} {shown(a)}, this training has {shown(b)}" for name, a, b in pairs if a != b]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a parameter group that stay fixed during training."""
    return {name: _plain(value) for name, value in group.items() if name not in _RATES | _RUNTIME}


def _schedule(state: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's options, from its state."""
    names = (name for name in state if not name.startswith("_") and name not in _COUNTERS)
    return {name: state[name] for name in names if isinstance(state[name], _SCALARS)}


def _plain(value: Any) -> Any:
    """Convert to plain data: numbers, text and lists stay, tensors become numbers, other objects their class name."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return None if value is None else type(value).__name__


def _class_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _same_class(a: str | None, b: str | None) -> bool:
    """Whether two names mean one class; a script's classes are in ``__main__`` only when it is run directly."""
    if a is None or b is None or "__main__" not in (a.rpartition(".")[0], b.rpartition(".")[0]):
        return a == b
    return a.rpartition(".")[2] == b.rpartition(".")[2]


def _shown(name: str | None, other: str | None) -> str:
    """The short name of a class; the full name if both short names are equal."""
    if name is None:
        return "None"
    short = name.rpartition(".")[2]
    return name if other is not None and short == other.rpartition(".")[2] else short


def plain_settings(learner: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, config: Any) -> dict[str, Any]:
    """Settings of a training started from Python, as scalars and short lists, for config.yaml."""
    found: dict[str, Any] = asdict(config)
    found["optimizer"] = type(optimizer).__name__
    for name, value in optimizer.defaults.items():
        found[f"optimizer.{name}"] = value
    found["scheduler"] = None if scheduler is None else type(scheduler).__name__
    if scheduler is not None:
        found |= {f"scheduler.{name}": value for name, value in _schedule(scheduler.state_dict()).items()}
    for prefix, module in learner.named_modules():
        if not type(module).__module__.startswith("torch."):  # torch's layers follow from the learner's settings
            where = ".".join(filter(None, ("learner", prefix)))
            found |= dict(_attributes(module, where, text=True))
    plain = {name: _plain(value) for name, value in found.items()}
    return {name: value for name, value in plain.items() if not isinstance(value, list) or _is_short(value)}


def _is_short(values: list[Any]) -> bool:
    return len(values) <= LIST_ENTRIES and all(isinstance(value, _SCALARS) for value in values)


# --------------------------------------------------------------------------------------------------- between processes


def settings_of(learner: nn.Module, tasks: object, identity: Identity, config: Mapping[str, Any]) -> dict[str, str]:
    """Settings that must agree between processes at the start of a run, by name.

    Public attributes of the learner's modules that are numbers, text or lists of them count as settings; an attribute
    that may differ between processes starts with an underscore. Of the tasks only numbers count, as their folder may
    differ between machines. Parameter values do not count: they are broadcast from the first process.
    """
    facts = {name: repr(value) for name, value in config.items() if name != "device"}
    facts |= dict(_leaves(identity, ""))
    facts |= {"learner": _class_name(learner), "tasks": _class_name(tasks)}
    for prefix, module in learner.named_modules():
        where = ".".join(filter(None, ("learner", prefix)))
        facts |= {name: repr(value) for name, value in _attributes(module, where, text=True)}
    facts |= {name: repr(value) for name, value in _attributes(tasks, "tasks", text=False)}
    for name, tensor in learner.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            facts[f"learner's {name}"] = f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                facts[f"learner's {name}"] += ", frozen"
    return facts


def values_of(state: Mapping[str, Any]) -> dict[str, str]:
    """A state's tensors, as checksums, and its numbers, by name."""
    return dict(_leaves(state, ""))


def _attributes(owner: object, where: str, *, text: bool) -> Iterator[tuple[str, Any]]:
    kinds: tuple[type, ...] = (np.generic, *(_SCALARS if text else (bool, int, float)))
    for name, value in getattr(owner, "__dict__", {}).items():
        if name.startswith("_") or name in _OWN:
            continue
        entries = value.items() if isinstance(value, dict) else [("", value)]
        for key, entry in entries:
            parts = entry if isinstance(entry, list | tuple) else [entry]
            if all(isinstance(part, kinds) for part in parts):
                yield f"{where}.{name}" + (f".{key}" if key else ""), entry


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, Tensor):
        digest = hashlib.sha256(tree.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        yield name, f"{tree.dtype} {list(tree.shape)} of SHA-256 {digest.hexdigest()[:16]}".removeprefix("torch.")
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list | tuple) and not all(isinstance(entry, _SCALARS) for entry in tree):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{name}[{index}]")
    else:
        yield name, repr(tree)


def first_difference(facts: Sequence[Mapping[str, str]]) -> str:
    """Describe the first name whose values differ: the values, and the processes with each."""
    names = dict.fromkeys(name for one in facts for name in one)
    for name in names:
        values: dict[str, list[int]] = {}
        for rank, one in enumerate(facts):
            values.setdefault(one.get(name, "not there"), []).append(rank)
        if len(values) > 1:
            parts = [f"{shortened(value)} in process {_listed(ranks)}" for value, ranks in values.items()]
            return f"{name} is {' and '.join(parts)}"
    raise AssertionError("there is a difference")


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) < 9 else f"{ranks[0]} and {len(ranks) - 1} others"
