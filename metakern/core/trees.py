"""Trees of tensors: inputs, targets and outputs of models.

Axis legend: T tasks, S samples of a task.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.core.torch_private import pytree

#: A model's input or targets: a tensor, or a tuple or dict of tensors.
Data = Any

#: Types of constants in a model's output, beside tensors; they must be equal for all tasks.
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)

_Build = Callable[[Iterator[Any]], Any]


def named_tensors(name: str, data: Data) -> dict[str, Tensor]:
    """The tensors of an argument, keyed by their names in messages.

    Raises:
        TypeError: for anything but a tensor, or a tuple or dict of tensors
        ValueError: for an empty one
    """
    if isinstance(data, Tensor):
        return {name: data}
    if isinstance(data, Mapping):
        found = {f"{name}[{key!r}]": tensor for key, tensor in data.items()}
    elif isinstance(data, tuple):
        found = {f"{name}[{index}]": tensor for index, tensor in enumerate(data)}
    else:
        raise TypeError(f"{name} must be a tensor, or a tuple or a dict of tensors, got {type(data).__name__}")
    if not found:
        raise ValueError(f"{name} must hold at least one tensor, got an empty {type(data).__name__}")
    for part, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{part} must be a tensor, got {type(tensor).__name__}")
    return found


def map_tensors(function: Callable[[Tensor], Any], data: Data) -> Data:
    """Apply ``function`` to every tensor of a tree; mappings become dicts."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, Mapping):
        return {key: map_tensors(function, value) for key, value in data.items()}
    if isinstance(data, tuple):
        return pytree.tree_map_only(Tensor, function, data)
    return data


def as_data(data: Data) -> Data:
    """The same tree with mappings as dicts."""
    return map_tensors(lambda tensor: tensor, data)


def first_tensor(data: Data) -> Tensor:
    """The first of a tree's tensors."""
    if isinstance(data, Tensor):
        return data
    return first_tensor(next(iter(data.values() if isinstance(data, Mapping) else data)))


def flatten(output: Any) -> tuple[list[Tensor], Callable[[Iterable[Any]], Any]]:
    """The tensors in a model's output, and a function that rebuilds the output from new tensors.

    Containers that torch's pytrees know, dataclasses and subclasses of dict (model outputs of transformers are both)
    keep their type; constants stay.

    Raises:
        TypeError: for anything else
    """
    leaves: list[Any] = []
    build = _visit(output, leaves)
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if not places:
        raise TypeError(f"model must return at least one tensor, got {type(output).__name__}")

    def rebuild(tensors: Iterable[Any]) -> Any:
        new = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            new[place] = tensor
        return build(iter(new))

    return [leaves[place] for place in places], rebuild


def check_constants(outputs: Sequence[Any]) -> None:
    """Raise TypeError where the constants in a model's outputs differ between tasks, as only one could be kept."""
    found = []
    for output in outputs:
        leaves: list[Any] = []
        _visit(output, leaves)
        found.append([leaf for leaf in leaves if not isinstance(leaf, Tensor)])
    for constants in found[1:]:
        if repr(constants) != repr(found[0]):
            raise TypeError(
                f"model must return tensors for what differs between tasks, got {found[0]} for one and {constants} for "
                "another among its output"
            )


def map_output(function: Callable[..., Any], *outputs: Any) -> Any:
    """Apply ``function`` to corresponding tensors of several outputs of one model; returns the same structure."""
    flat = [flatten(output) for output in outputs]
    return flat[0][1](function(*tensors) for tensors in zip(*(leaves for leaves, _ in flat), strict=True))


def class_scores(output: Any) -> Tensor | None:
    """Class scores [..., classes, ...] of an output: the tensor itself, its ``logits`` (key or attribute), or None."""
    if isinstance(output, Tensor):
        return output
    scores = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return scores if isinstance(scores, Tensor) else None


def _visit(tree: Any, leaves: list[Any]) -> _Build:
    """Add the tensors and constants of a tree to ``leaves``; return a function that rebuilds it from new leaves."""
    if isinstance(tree, (Tensor, *_CONSTANTS)):
        leaves.append(tree)
        return next
    parts, spec = pytree.tree_flatten(tree, is_leaf=lambda node: node is not tree)
    if len(parts) != 1 or parts[0] is not tree:
        builds = [_visit(part, leaves) for part in parts]
        return lambda tensors: pytree.tree_unflatten([build(tensors) for build in builds], spec)
    is_dict = isinstance(tree, dict)
    names = [field.name for field in dataclasses.fields(tree)] if dataclasses.is_dataclass(tree) else []
    if not is_dict and not names:
        raise TypeError(
            "model must return tensors, or tuples, lists, dicts and dataclasses of them, got a "
            f"{type(tree).__name__} among them"
        )
    items = {key: _visit(value, leaves) for key, value in tree.items()} if is_dict else {}
    fields = {name: _visit(getattr(tree, name), leaves) for name in names if name not in items}

    def build(tensors: Iterator[Any]) -> Any:
        new = copy.copy(tree)
        for key, item in items.items():
            new[key] = item(tensors)
            if key in names:  # entries of a model output are attributes too
                object.__setattr__(new, key, new[key])
        for name, field in fields.items():
            object.__setattr__(new, name, field(tensors))
        return new

    return build
