"""mlp_inner_loop in plain PyTorch: K gradient steps of T small MLPs, every task with parameters of its own.

Finn et al. 2017, "Model-Agnostic Meta-Learning", arXiv 1703.03400, algorithm 1.

Axis legend: T tasks, S samples of a task, K inner steps, L layers; I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.reference.inner_update import inner_update

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
}

LOSSES = ("mse", "cross_entropy", "binary_cross_entropy_with_logits")


def predict(params: Sequence[Tensor], x: Tensor, activation: str) -> Tensor:
    """Outputs [T, S, O] of MLPs for x [T, S, I]; weights [T, O, I] and biases [T, O] in the order of the layers."""
    for layer in range(0, len(params), 2):
        x = torch.baddbmm(params[layer + 1].unsqueeze(1), x, params[layer].transpose(1, 2))
        if layer + 2 < len(params):
            x = ACTIVATIONS[activation](x)
    return x


def task_losses(prediction: Tensor, y: Tensor, loss: str, mask: Tensor | None = None) -> Tensor:
    """Mean loss [T] of every task's predictions [T, S, O]; with a mask [T, S] the mean over its samples.

    A task none of whose samples count has a loss of zero, and so have its gradients.
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
    activation: str,
    loss: str,
) -> list[list[Tensor]]:
    """The parameters before the first and after every step, [K + 1] lists of tensors [T, O, I] and [T, O].

    Args:
        params: weights [O, I] or [T, O, I] and biases [O] or [T, O] in the order of the layers
        support_x: [T, S, I]
        support_y: [T, S, O], or labels [T, S]
        support_mask: bool [T, S], or None
        lr: α, as for :func:`~metakern.reference.inner_update.inner_update`, one for each of ``params`` or one for all
        steps: K
        per_step: whether ``lr`` has a leading axis [K]
        adapted: for each of ``params`` whether the steps change it
        first_order: for every step whether its gradient is a constant
        activation: between the layers, of :data:`ACTIVATIONS`
        loss: one of :data:`LOSSES`
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
        # No task's loss depends on another's parameters. The transforms of torch.func see through its own gradient.
        grads = torch.func.grad(support_loss)([now[i] for i in wanted], now)
        if first_order[step]:
            grads = [g.detach() for g in grads]
        stepped = inner_update([now[i] for i in wanted], grads, rates, step=step if per_step else None)
        now = list(now)
        for i, p in zip(wanted, stepped, strict=True):
            now[i] = p
        trajectory.append(now)
    return trajectory
