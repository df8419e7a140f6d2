"""AdamW for parameter groups of LearnedOptimizer with ``rule=None``.

Loshchilov & Hutter 2019, arXiv 1711.05101. Steps by torch.optim.AdamW's own function: fused where torch has fused
kernels for the parameters, else on whole lists of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from metakern.core.torch_private import fused_or_foreach
from metakern.optim.groups import check_keys, check_rate

#: A group's options, with torch.optim.AdamW's defaults. The optimizer's own lr is a factor of the rule's update, not a
#: learning rate, so it does not apply here.
DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}

#: Names of a parameter's moments in its state.
MOMENTS = ("exp_avg", "exp_avg_sq")


class Options(NamedTuple):
    """A group's checked options."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def is_adamw(group: Mapping[str, Any]) -> bool:
    """Whether AdamW steps the group: it has ``rule=None``."""
    return "rule" in group and group["rule"] is None


def check_options(group: Mapping[str, Any], name: str) -> Options:
    """The options of a group.

    Raises:
        TypeError: for options that are no numbers
        ValueError: for options out of range, and for unknown keys
    """
    check_keys(group, name, ("rule", *DEFAULTS), "which AdamW, the choice of rule=None, does not have here")
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(isinstance(b, (Real, Tensor)) for b in betas):
        raise TypeError(f"betas of {name} must be a pair of numbers, got {betas!r}")
    first, second = (float(beta) for beta in betas)
    if not (0 <= first < 1 and 0 <= second < 1):
        raise ValueError(f"betas of {name} must be at least 0 and less than 1, got {(first, second)}")
    rates = {key: check_rate(group[key], f"{key} of {name}") for key in ("lr", "eps", "weight_decay")}
    return Options(rates["lr"], (first, second), rates["eps"], rates["weight_decay"])


@dataclass(eq=False, slots=True)
class AdamWStep:
    """One step of the parameters of a group that have a gradient.

    Attributes:
        params: the parameters
        entries: their states: ``step``, a float32 tensor [] as fused kernels take it, ``numel`` and the moments
        options: the group's
    """

    params: list[Tensor]
    entries: list[dict[str, Any]]
    options: Options

    def run(self) -> None:
        """Update the parameters and their states."""
        if not self.params:
            return
        # One call for each device and dtype: whether a call is fused depends on all its tensors.
        kinds: dict[Any, list[int]] = {}
        for index, p in enumerate(self.params):
            kinds.setdefault((p.device, p.dtype), []).append(index)
        for members in kinds.values():
            self._run([self.params[i] for i in members], [self.entries[i] for i in members])

    def _run(self, params: list[Tensor], entries: list[dict[str, Any]]) -> None:
        lr, (beta1, beta2), eps, weight_decay = self.options
        fused, foreach = fused_or_foreach(params, False, use_fused=True)
        if fused:  # its kernels count on the device
            for p, entry in zip(params, entries, strict=True):
                entry["step"] = entry["step"].to(p.device)
        first, second = ([entry[name] for entry in entries] for name in MOMENTS)
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            first,
            second,
            [],
            [entry["step"] for entry in entries],
            foreach=foreach,
            fused=fused,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )


def prepare_entry(entry: dict[str, Any], p: Tensor, name: str) -> None:
    """Start a parameter's state, or check it and cast it to the parameter's dtype and device.

    Raises:
        ValueError: for a state of a rule, or of another shape
    """
    if not entry:
        moments = {key: torch.zeros_like(p, memory_format=torch.preserve_format) for key in MOMENTS}
        entry.update(step=torch.zeros(()), numel=p.numel(), **moments)
        return
    got = {key: list(x.shape) for key, x in entry.items() if isinstance(x, Tensor) and key != "step"}
    if got != {key: list(p.shape) for key in MOMENTS} or not isinstance(entry.get("step"), Tensor):
        raise ValueError(
            f"rule=None needs the state of AdamW for {name}, {' and '.join(MOMENTS)} of its shape, got {got}; delete "
            "optimizer.state[parameter] to let it start anew"
        )
    for key in MOMENTS:
        entry[key] = entry[key].to(p)


def export_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state for a checkpoint; the tensors are copies."""
    return {"step": int(entry["step"]), **{key: entry[key].clone() for key in MOMENTS}}


def import_entry(saved: Mapping[str, Any], p: Tensor, name: str) -> dict[str, Tensor]:
    """A parameter's state from :func:`export_entry`, copied to its dtype and device.

    Raises:
        ValueError: for an entry that does not fit
    """
    found = {"step": torch.tensor(float(saved["step"]))}
    for key in MOMENTS:
        x = saved.get(key)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape != p.shape or x.is_sparse:
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{key} of {name} must be a dense tensor of floats, {list(p.shape)}, got {got}")
        found[key] = x.detach().to(p, copy=True)
    return found
