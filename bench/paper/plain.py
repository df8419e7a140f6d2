"""The optimizers in plain PyTorch, as public code writes them: one launch per operation, no library around it.

Axis legend: T tasks, N coordinates of all tensors of all tasks, n coordinates of one tensor of one task.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.inner_loop.updates import RuleUpdate
from metakern.ops.hrnn_step import reference
from metakern.ops.lstm_step.reference import gradient_features
from metakern.rules import CoordinatewiseLSTM, HierarchicalRNN
from metakern.rules.protocol import RuleState

Params = dict[str, Tensor]


class PlainLSTM(torch.nn.Module):
    """Coordinatewise LSTM of ``nn.LSTMCell`` s and ``nn.Linear``; all tensors of a task are one vector.

    Public code calls the cells tensor by tensor, which takes more launches.
    """

    def __init__(self, rule: CoordinatewiseLSTM) -> None:
        super().__init__()
        plain = rule.plain()
        self.cells, self.head = plain.cells, plain.head
        self.preprocess, self.preprocess_scale = rule.preprocess, rule.preprocess_scale
        self.output_scale = rule.output_scale

    def init_state(self, params: Params) -> list[tuple[Tensor, Tensor]]:
        """Zero (h, c), each [N, H], of every layer."""
        first = next(iter(params.values()))
        zeros = first.new_zeros(sum(p.numel() for p in params.values()), self.head.in_features)
        return [(zeros, zeros) for _ in self.cells]

    def forward(self, params: Params, grads: Params, state: Any) -> tuple[Params, Any]:
        """One step of all coordinates."""
        flat = torch.cat([grads[name].reshape(-1) for name in params])
        x = gradient_features(flat, self.preprocess, self.preprocess_scale)
        new_state = []
        for cell, (h, c) in zip(self.cells, state, strict=True):
            x, new_c = cell(x, (h, c))
            new_state.append((x, new_c))
        pieces = (self.output_scale * self.head(x)).squeeze(-1).split([p.numel() for p in params.values()])
        new = {name: p + piece.view(p.shape) for (name, p), piece in zip(params.items(), pieces, strict=True)}
        return new, new_state

    def ordered(self) -> list[Tensor]:
        """The weights in the order of the fused rule's."""
        return list(self.parameters())


class PlainHRNN(torch.nn.Module):
    """Hierarchical RNN: the parameter level tensor by tensor, then the tensor and the global level.

    The parameter level is :mod:`metakern.ops.hrnn_step.reference`, the formulas in plain PyTorch.
    """

    def __init__(self, rule: HierarchicalRNN) -> None:
        super().__init__()
        self.rule = rule.plain()

    def init_state(self, params: Params) -> RuleState:
        """The rule's initial state of T tasks, its log rates drawn for each task as RuleLearner does."""
        state: RuleState = RuleUpdate(self.rule, redraws=True).init_state(params)
        return state

    def forward(self, params: Params, grads: Params, state: RuleState) -> tuple[Params, RuleState]:
        """One step of all tensors of T tasks."""
        rule, of_all = self.rule, state.shared["global"]
        flat = [p.flatten(1) for p in params.values()]
        sizes = [p.shape[1] for p in flat]
        means = [e["mean_rate"] * (n / sum(sizes)) for e, n in zip(state.per_tensor, sizes, strict=True)]
        tensor = torch.stack([entry["tensor"] for entry in state.per_tensor])
        own = torch.cat([rule.parameter_gru.gates_bias, rule.parameter_gru.candidate_bias])
        step = reference.hrnn_step(
            flat,
            [grads[name].flatten(1) for name in params],
            [entry["coordinates"] for entry in state.per_tensor],
            rule.tensor_to_parameter(tensor) + (rule.global_to_parameter(of_all) + own),
            torch.stack(means).sum(0),
            rule.weights(),
        )
        tensor = rule.tensor_gru(step.means[..., :-1], tensor, rule.global_to_tensor(of_all))
        of_all = rule.global_gru(tensor.mean(0), of_all)
        rates = step.means[..., -1]
        entries = tuple(
            {"coordinates": x, "tensor": t, "mean_rate": r} for x, t, r in zip(step.states, tensor, rates, strict=True)
        )
        new = {name: x.view(p.shape) for (name, p), x in zip(params.items(), step.params, strict=True)}
        return new, RuleState(entries, {"global": of_all}, True)

    def ordered(self) -> list[Tensor]:
        """The weights in the order of the fused rule's."""
        return list(self.rule.parameters())


def plain(rule: Any) -> PlainLSTM | PlainHRNN:
    """The rule with the same weights in plain PyTorch."""
    return PlainHRNN(rule) if isinstance(rule, HierarchicalRNN) else PlainLSTM(rule)


def logits(kind: str, params: Params, images: Tensor) -> Tensor:
    """Outputs [B, 10] of one network of a kind on images [B, 64]; params in the order of its modules."""
    w = list(params.values())
    if kind == "regression":
        return F.linear(images, *w)
    if kind == "mlp":
        return F.linear(F.linear(images, w[0], w[1]).sigmoid(), w[2], w[3])
    if kind == "cnn":
        maps = F.conv2d(images.unflatten(-1, (1, 8, 8)), w[0], w[1], stride=2, padding=1).relu()
        maps = F.conv2d(maps, w[2], w[3], stride=2, padding=1).relu()
        return F.linear(maps.flatten(1), w[4], w[5])
    rows = F.linear(images.unflatten(-1, (8, 8)), w[0], w[1]).unbind(1)
    hidden = rows[0].tanh()
    for row in rows[1:]:
        hidden = (row + F.linear(hidden, w[2])).tanh()
    return F.linear(hidden, w[3], w[4])


def loss_of_one(kind: str, params: Params, images: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy [] of one network."""
    return F.cross_entropy(logits(kind, params, images), labels)
