"""Checks and normalization of the inner loop's learning rates.

Axis legend: K inner steps, ``*shape`` the shape of one parameter tensor of the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metakern.core.checks import check_rate


@dataclass(frozen=True)
class LearningRates:
    """α in the form of inner_update's reference; with ``per_step``, ``values`` have a leading axis [K]."""

    values: float | Tensor | list[Tensor]
    per_step: bool


def learning_rates(lr: Any, params: Mapping[str, Tensor], steps: int | None) -> LearningRates:
    """α from a number, a tensor of one element, a mapping by name, or a sequence in the order of ``params``.

    Args:
        lr: see :func:`metakern.adapt`; in a mapping, names or glob patterns
        params: the adapted parameters, each [*shape]
        steps: K; None if no rate differs by step
    """
    # The most frequent case first, as the others are slower to recognise. Comparisons in place of math.isfinite, which
    # torch.compile does not trace for a symbolic float (a rate that changes between calls).
    if isinstance(lr, float) and -math.inf < lr < math.inf:
        return LearningRates(lr, False)
    if isinstance(lr, (Mapping, nn.ParameterDict)):
        return _rates_of_tensors(rates_by_name(lr, list(params)), params, steps)
    if isinstance(lr, (list, tuple, nn.ParameterList)):
        if len(lr) != len(params):
            raise ValueError(f"lr must have one entry an adapted parameter, {len(params)}, got {len(lr)}")
        return _rates_of_tensors(dict(zip(params, lr, strict=True)), params, steps)
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                f"lr as one tensor must have 1 element, got shape {list(lr.shape)}; "
                "for one a parameter or step give a dict or a list"
            )
        return LearningRates(lr.reshape(()), False)
    check_rate("lr", lr)
    return LearningRates(float(lr), False)


def rates_by_name(lr: Any, names: Sequence[str], *, strict: bool = True) -> dict[str, Any]:
    """The entry for each of ``names`` in a mapping by name or glob pattern: the exact name, else the first match.

    Args:
        lr: the mapping
        names: parameter names
        strict: whether every entry must be used

    Raises:
        ValueError: for a name without an entry, and for a pattern that matches no name or none that earlier patterns
            leave.
    """
    patterns = {key: matching(key) for key in lr if isinstance(key, str) and key not in names}
    matches = {key: [name for name in names if pattern.fullmatch(name)] for key, pattern in patterns.items()}
    chosen = {}
    for name in names:
        keys = [name] if name in lr else [key for key, matched in matches.items() if name in matched]
        if keys:
            chosen[name] = keys[0]
    missing, unknown = [name for name in names if name not in chosen], [key for key in lr if key not in names]
    unknown = [key for key in unknown if not matches.get(key)]
    if missing or (unknown and strict):
        raise ValueError(
            f"lr must name the adapted parameters, {list(names)}, or match them by glob patterns: missing {missing}, "
            f"not among them {unknown}"
        )
    for key, matched in matches.items():
        takers = [chosen[name] for name in matched if chosen[name] in patterns]
        if strict and takers and key not in takers:
            raise ValueError(f"lr: {key!r} comes after {takers[0]!r}, which matches before it; put {key!r} first")
    return {name: lr[key] for name, key in chosen.items()}


def matching(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob pattern: ``*`` matches any characters, ``?`` one."""
    # Not fnmatch, which torch.compile does not trace.
    return re.compile("".join({"*": ".*", "?": "."}.get(c) or re.escape(c) for c in pattern))


def real_dtype(p: Tensor) -> torch.dtype:
    """The dtype of a parameter's learning rate: its own, or the real dtype of a complex parameter."""
    return p.dtype.to_real() if p.is_complex() else p.dtype


def _rates_of_tensors(rates: Mapping[str, Any], params: Mapping[str, Tensor], steps: int | None) -> LearningRates:
    """α from one entry per parameter tensor."""
    values, layouts = {}, {}
    for name, rate in rates.items():
        p = params[name]
        if not isinstance(rate, Tensor):
            check_rate(f"lr[{name!r}]", rate)
        value = rate if isinstance(rate, Tensor) else torch.tensor(float(rate), dtype=real_dtype(p), device=p.device)
        layouts[name] = _layouts(name, value, p, steps)
        values[name] = value
    kinds = {layout for found in layouts.values() if len(found) == 1 for layout in found if layout != "tensor"}
    ambiguous = [name for name, found in layouts.items() if len(found) > 1]
    if ambiguous and len(kinds) != 1:
        raise ValueError(
            f"lr[{ambiguous[0]!r}] of shape [{steps}] may mean one a parameter or one a step: give "
            f"[{steps}, {steps}], one a step and parameter"
        )
    if steps is None or not kinds & {"step"}:
        return LearningRates(list(values.values()), False)
    spread = [
        value if layouts[name] & {"step"} else value.expand(steps, *value.shape) for name, value in values.items()
    ]
    return LearningRates(spread, True)


def _layouts(name: str, value: Tensor, p: Tensor, steps: int | None) -> set[str]:
    """Possible meanings of a rate's shape: "tensor" [], "parameter" [*shape], "step" [K] or [K, *shape]."""
    if value.dim() == 0:
        return {"tensor"}
    if value.dtype != real_dtype(p):
        raise TypeError(f"lr[{name!r}] must have the parameter's dtype, {real_dtype(p)}, got {value.dtype}")
    found = set()
    by_step = () if steps is None else ((steps,), (steps, *p.shape))
    if value.shape == p.shape:
        found.add("parameter")
    if value.shape in by_step:
        found.add("step")
    if not found:
        shapes = " or ".join(str(list(s)) for s in ((), tuple(p.shape), *by_step))
        raise ValueError(f"lr[{name!r}] must have shape {shapes}, got {list(value.shape)}")
    return found
