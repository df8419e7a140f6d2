"""mlp_inner_loop in plain PyTorch: K gradient steps of T small MLPs, each task with its own parameters.

Finn et al. 2017, "Model-Agnostic Meta-Learning", arXiv 1703.03400, algorithm 1.

Axis legend: T tasks, S samples of a task, K inner steps, L layers; I inputs and O outputs of a layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.ops.inner_update.reference import inner_update

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
}

#: Default slope of "leaky_relu", as in PyTorch.
_DEFAULT_SLOPE = 0.01

LOSSES = ("mse", "cross_entropy", "binary_cross_entropy_with_logits")


def parse_activation(name: str) -> tuple[str, float]:
    """Parse an activation to one of :data:`ACTIVATIONS` and the slope of ``"leaky_relu"`` at and below 0 (else 0).

    Args:
        name: one of :data:`ACTIVATIONS`, ``"leaky_relu:<slope>"`` or ``"identity"``, a leaky ReLU with a slope of 1

    Raises:
        ValueError: for another name, and a slope that is negative or not finite
    """
    if name == "identity":
        return "leaky_relu", 1.0
    kind, colon, text = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind not in ACTIVATIONS or (colon and kind != "leaky_relu"):
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {known}, leaky_relu:<slope> and identity, got {name!r}")
    if not colon:
        return kind, _DEFAULT_SLOPE if kind == "leaky_relu" else 0.0
    try:
        slope = float(text)
    except ValueError:
        slope = math.nan
    if not 0 <= slope < math.inf:
        raise ValueError(f"the slope of a leaky_relu must be a finite number, not negative, got {name!r}")
    return ("leaky_relu", slope) if slope else ("relu", 0.0)


def activations_of(activation: str | Sequence[str], hidden: int) -> tuple[tuple[str, float], ...]:
    """:func:`parse_activation` for every hidden layer, from one name for all or one name per layer.

    Raises:
        ValueError: for unknown names, or a number of names that is not ``hidden``
    """
    if isinstance(activation, str):
        return (parse_activation(activation),) * hidden
    if len(activation) != hidden:
        raise ValueError(
            f"activation must be one name, or one for each of {hidden} hidden layers, got {list(activation)}"
        )
    return tuple(map(parse_activation, activation))


def _function(kind: str, slope: float) -> Callable[[Tensor], Tensor]:
    return functools.partial(F.leaky_relu, negative_slope=slope) if kind == "leaky_relu" else ACTIVATIONS[kind]


def predict(params: Sequence[Tensor], x: Tensor, activation: str | Sequence[str]) -> Tensor:
    """Outputs [T, S, O] of MLPs for x [T, S, I]; weights [T, O, I] and biases [T, O] in the order of the layers."""
    functions = [_function(*pair) for pair in activations_of(activation, len(params) // 2 - 1)]
    for layer in range(0, len(params), 2):
        x = torch.baddbmm(params[layer + 1].unsqueeze(1), x, params[layer].transpose(1, 2))
        if layer + 2 < len(params):
            x = functions[layer // 2](x)
    return x


def task_losses(prediction: Tensor, y: Tensor, loss: str, mask: Tensor | None = None) -> Tensor:
    """Mean loss [T] of every task's predictions [T, S, O]; with a mask [T, S] the mean over its True samples.

    A task whose samples are all masked out has a loss and gradients of zero.
    """
    if loss == "cross_entropy":
        per_sample = F.cross_entropy(prediction.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    elif loss == "mse":
        per_sample = F.mse_loss(prediction, y, reduction="none").mean(2)
    else:
        per_sample = F.binary_cross_entropy_with_logits(prediction, y, reduction="none").mean(2)
    if mask is None:
        return per_sample.mean(1)
    return torch.where(mask, per_sample, torch.zeros_like(per_sample)).sum(1) / mask.sum(1).clamp(min=1)


def mlp_inner_loop(
    params: Sequence[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    support_mask: Tensor | None,
    lr: float | Tensor | Sequence[Tensor],
    *,
    steps: int,
    per_step: bool,
    adapted: Sequence[bool],
    first_order: Sequence[bool],
    activation: str | Sequence[str],
    loss: str,
    clip_norm: float | None = None,
) -> list[list[Tensor]]:
    """The parameters before the first and after each step: K + 1 lists of tensors [T, O, I] and [T, O].

    Args:
        params: weights [O, I] or [T, O, I] and biases [O] or [T, O] in the order of the layers
        support_x: [T, S, I]
        support_y: [T, S, O], or labels [T, S]
        support_mask: bool [T, S], or None
        lr: α, as for inner_update's reference, one for each of ``params`` or one for all
        steps: K
        per_step: whether ``lr`` has a leading axis [K]
        adapted: for each of ``params`` whether the steps change it
        first_order: for every step whether its gradient is treated as a constant
        activation: between the layers, as for :func:`parse_activation`; one name for all, or one per hidden layer
        loss: one of :data:`LOSSES`
        clip_norm: largest norm of a task's gradient over all adapted tensors; a longer one is scaled down to it
    """
    num_tasks = support_x.shape[0]
    now = [p if p.dim() == 3 - i % 2 else p.unsqueeze(0).expand(num_tasks, *p.shape) for i, p in enumerate(params)]
    wanted = [i for i, flag in enumerate(adapted) if flag]
    rates = [lr[i] for i in wanted] if isinstance(lr, Sequence) else lr
    trajectory = [now]

    def support_loss(changing: Sequence[Tensor], now: Sequence[Tensor]) -> Tensor:
        at = list(now)
        for i, p in zip(wanted, changing, strict=True):
            at[i] = p
        return task_losses(predict(at, support_x, activation), support_y, loss, support_mask).sum()

    for step in range(steps):
        # The sum's gradient is per task, as tasks are independent. torch.func.grad can itself be transformed.
        grads = torch.func.grad(support_loss)([now[i] for i in wanted], now)
        if first_order[step]:
            grads = [g.detach() for g in grads]
        index = step if per_step else None
        stepped = inner_update([now[i] for i in wanted], grads, rates, step=index, clip_norm=clip_norm)
        now = list(now)
        for i, p in zip(wanted, stepped, strict=True):
            now[i] = p
        trajectory.append(now)
    return trajectory
