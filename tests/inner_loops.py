"""Handwritten MAML, one task and one step at a time: the reference for the batched inner loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metakern import meta_loss
from tests.conftest import assert_close


@dataclass
class Episode:
    """Support and query sets of some tasks."""

    support: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]


def regression(tasks: int, shots: int, queries: int, inputs: int, outputs: int, seed: int = 0) -> Episode:
    generator = torch.Generator().manual_seed(seed)

    def sets(samples: int) -> tuple[Tensor, Tensor]:
        sizes = (inputs, outputs)
        x, y = (torch.randn(tasks, samples, n, generator=generator, dtype=torch.float64) for n in sizes)
        return x, y

    return Episode(sets(shots), sets(queries))


def sinusoids(tasks: int, shots: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Episode:
    """Finn et al. 2017, section 5.1: amplitude U[0.1, 5], phase U[0, π], x U[-5, 5]."""
    amplitude, phase = torch.rand(2, tasks, 1, 1, generator=generator, dtype=dtype)
    x = torch.rand(2, tasks, shots, 1, generator=generator, dtype=dtype) * 10 - 5
    y = (amplitude * 4.9 + 0.1) * torch.sin(x - phase * torch.pi)
    return Episode((x[0], y[0]), (x[1], y[1]))


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.Tanh, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1]).double()


def hand_written(
    model: nn.Module,
    episode: Episode,
    steps: int,
    rate: Callable[[str, int], float | Tensor],
    *,
    loss: Callable[..., Tensor] = F.mse_loss,
    first_order: Sequence[bool] | bool = False,
    names: Sequence[str] | None = None,
    clip_norm: float | None = None,
    masks: tuple[Tensor, Tensor] | None = None,
    step_weights: Sequence[float] | None = None,
) -> Tensor:
    """Query losses [T]; ``rate(name, step)`` is α."""
    orders = [first_order] * steps if isinstance(first_order, bool) else first_order
    losses = []
    for task in range(episode.support[0].shape[0]):
        sets = [tuple(tensor[task] for tensor in part) for part in (episode.support, episode.query)]
        if masks is not None:
            sets = [tuple(t[mask[task]] for t in part) for part, mask in zip(sets, masks, strict=True)]
        params = dict(model.named_parameters())
        adapted = [n for n, p in params.items() if p.requires_grad and (names is None or n in names)]
        total: Tensor | float = 0.0
        for step in range(steps):
            support_loss = evaluate(model, params, sets[0], loss)
            options = {"create_graph": not orders[step], "retain_graph": True}
            found = torch.autograd.grad(support_loss, [params[name] for name in adapted], **options)
            norm = torch.cat([g.flatten() for g in found]).norm()
            scale = clip_norm / norm if clip_norm is not None and norm > clip_norm else 1.0
            for name, g in zip(adapted, found, strict=True):
                params[name] = params[name] - rate(name, step) * (g * scale)
            if step_weights is not None:
                total = total + step_weights[step] * evaluate(model, params, sets[1], loss)
        losses.append(evaluate(model, params, sets[1], loss) if step_weights is None else total)
    return torch.stack(losses)


def evaluate(
    model: nn.Module, params: dict[str, Tensor], data: tuple[Tensor, ...], loss: Callable[..., Tensor]
) -> Tensor:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    if isinstance(model, Tied):
        return loss(model.functional(*params.values(), data[0]), data[1])
    return loss(functional_call(model, {**params, **buffers}, (data[0],)), data[1])


class Tied(nn.Module):
    """One weight under two names, one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
        self.b.weight = self.a.weight
        self.again, self.head = self.a, nn.Linear(2, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.b(self.a(x).tanh()).tanh()).tanh())

    @staticmethod
    def functional(weight: Tensor, a: Tensor, b: Tensor, head: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        """The same by hand: functional_call would leave the module changed (pytorch issue 164759)."""
        for offset in (a, b, a):
            x = F.linear(x, weight, offset).tanh()
        return F.linear(x, head, bias)


def assert_same(losses: Tensor, expected: Tensor, leaves: list[Tensor], tolerance: float = 1e-10) -> None:
    """The losses of all tasks, and the meta-gradients of their mean."""
    assert_close("query losses", losses, expected, tolerance)
    got, want = (torch.autograd.grad(x.mean(), leaves, retain_graph=True) for x in (losses, expected))
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(f"meta-gradient {index}", a, b, tolerance)


def check(model: nn.Module, episode: Episode, steps: int, lr: Any = 0.1, rate: Any = None, **options: Any) -> Tensor:
    """meta_loss against the loop by hand, meta-gradients in every parameter."""
    by_hand = {k: options[k] for k in ("loss", "first_order", "clip_norm", "step_weights") if k in options}
    names = options.pop("names", None)
    losses = meta_loss(model, episode.support, episode.query, steps=steps, lr=lr, **options)
    rates = rate or (lambda name, step: lr)
    expected = hand_written(model, episode, steps, rates, names=names, **by_hand)
    learned = [x for x in (lr.values() if isinstance(lr, dict) else [lr]) if isinstance(x, Tensor)]
    leaves = [p for p in model.parameters() if p.requires_grad] + [x for x in learned if x.requires_grad]
    assert_same(losses, expected, leaves)
    return losses
