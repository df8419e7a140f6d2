"""Options of LearnedOptimizer's parameter groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

#: A group's options, besides its parameters.
OPTIONS = ("lr", "weight_decay")

#: Further allowed keys: bookkeeping of torch's optimizers and schedulers, and a user's name for the group.
_OTHER_KEYS = frozenset({"params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "swa_lr"})


def check_group(group: Mapping[str, Any], name: str) -> tuple[float, float]:
    """``lr`` and ``weight_decay`` of a group as numbers.

    Raises:
        TypeError: for options that are no numbers
        ValueError: for options that are negative or not finite, and for unknown keys
    """
    if "rule" in group:
        got = type(group["rule"]).__name__
        raise TypeError(
            f"rule of {name} must be None, for AdamW, or left out, for the rule of the optimizer, got {got}"
        )
    check_keys(group, name, OPTIONS, "which a learned optimizer does not have")
    return check_rate(group["lr"], f"lr of {name}"), check_rate(group["weight_decay"], f"weight_decay of {name}")


def check_keys(group: Mapping[str, Any], name: str, options: Sequence[str], why: str) -> None:
    """Raise ValueError for keys of a group that are neither options nor bookkeeping; ``why`` says what is wrong."""
    unknown = [key for key in group if key not in options and key not in _OTHER_KEYS and not _is_off(group, key)]
    if unknown:
        raise ValueError(f"{name} must hold the options {', '.join(options)} alone, got {unknown}, {why}")


def check_dense_grad(p: Tensor, name: str) -> None:
    """Raise TypeError for a gradient that is not dense."""
    if p.grad is not None and p.grad.layout != torch.strided:
        raise TypeError(
            f"gradient of {name} must be dense, got {p.grad.layout}: make its nn.Embedding with sparse=False, or let "
            "p.grad = p.grad.to_dense() before the step"
        )


def _is_off(group: Mapping[str, Any], key: str) -> bool:
    """Whether it is ``differentiable=False``, which torch adds to every group of an unpickled optimizer."""
    return key == "differentiable" and group[key] is False


def check_rate(rate: Any, name: str) -> float:
    """``rate`` as a float; TypeError if it is no number, ValueError if negative or not finite."""
    if not isinstance(rate, (Real, Tensor)) or (isinstance(rate, Tensor) and rate.numel() != 1):
        raise TypeError(f"{name} must be a number, got {rate!r}")
    value = float(rate)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    return value
