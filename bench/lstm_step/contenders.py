"""Contenders for one coordinatewise-LSTM step, behind one interface: the kernel, eager and compiled PyTorch.

Axis legend: N coordinates, F features, H hidden units, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.peers import compile_peer, largest_error
from metakern.ops import LSTMState, lstm_step, pack_state, unpack_state
from metakern.rules import CoordinatewiseLSTM
from metakern.rules.plain_lstm import PlainLSTM


class Contender(Protocol):
    """One implementation of the step, with a state in the layout that suits it."""

    name: str
    weights: list[Tensor]

    def pack(self, h: Tensor, c: Tensor) -> Any:
        """Build the contender's state from h and c, each [L, N, H]."""

    def tensors(self, state: Any) -> list[Tensor]:
        """The tensors that a state consists of."""

    def unpack(self, state: Any) -> tuple[Tensor, Tensor]:
        """H and c, each [L, N, H]."""

    def step(self, params: Tensor, grads: Tensor, state: Any) -> tuple[Tensor, Any]:
        """New params [N] and new state from params [N], grads [N] and state."""


class Fused:
    """metakern.ops.lstm_step."""

    name = "metakern"

    def __init__(self, rule: CoordinatewiseLSTM) -> None:
        self.weights = [w.detach().clone().requires_grad_() for w in rule.weights()]

    def pack(self, h: Tensor, c: Tensor) -> LSTMState:
        """Tiles of 32 coordinates."""
        return pack_state(h, c)

    def tensors(self, state: LSTMState) -> list[Tensor]:
        """One."""
        return [state.data]

    def unpack(self, state: LSTMState) -> tuple[Tensor, Tensor]:
        """H and c, each [L, N, H]."""
        return unpack_state(state)

    def step(self, params: Tensor, grads: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        """One kernel."""
        return lstm_step(params, grads, state, self.weights, backend="cpp")


class Eager:
    """Plain PyTorch, launch by launch."""

    name = "eager"

    def __init__(self, rule: CoordinatewiseLSTM) -> None:
        self.module = PlainLSTM(rule)
        self.weights: list[Tensor] = list(self.module.parameters())

    def pack(self, h: Tensor, c: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(h, c), each [N, H], for every layer."""
        return [(h_l.clone(), c_l.clone()) for h_l, c_l in zip(h, c, strict=True)]

    def tensors(self, state: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Two a layer."""
        return [x for pair in state for x in pair]

    def unpack(self, state: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """H and c, each [L, N, H]."""
        h, c = zip(*state, strict=True)
        return torch.stack(h), torch.stack(c)

    def step(self, params: Tensor, grads: Tensor, state: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Any]:
        """About thirty launches."""
        result: tuple[Tensor, Any] = self.module(params, grads, state)
        return result


class Compiled(Eager):
    """torch.compile of the plain step, specialised to its sizes."""

    name = "compiled"

    def __init__(self, rule: CoordinatewiseLSTM) -> None:
        super().__init__(rule)
        self.compiled = compile_peer(self.module)

    def step(self, params: Tensor, grads: Tensor, state: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Any]:
        """Step compiled by inductor."""
        result: tuple[Tensor, Any] = self.compiled(params, grads, state)
        return result


@dataclass
class Problem:
    """One set of inputs of one contender; cotangents only if a backward is measured."""

    contender: Contender
    params: Tensor
    grads: Tensor
    state: Any
    cotangents: list[Tensor]

    def forward(self) -> tuple[Tensor, Any]:
        """The step without a graph."""
        with torch.no_grad():
            return self.contender.step(self.params, self.grads, self.state)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """Gradients of params, of the state's tensors and of every weight, in this order."""
        params, state = self.contender.step(self.params, self.grads, self.state)
        inputs = [self.params, *self.contender.tensors(self.state), *self.contender.weights]
        return torch.autograd.grad([params, *self.contender.tensors(state)], inputs, self.cotangents)


def make_rule(hidden_size: int = 20, num_layers: int = 2) -> CoordinatewiseLSTM:
    """A rule with the same random weights in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CoordinatewiseLSTM(hidden_size, num_layers, backend="cpp")


def make_contenders(rule: CoordinatewiseLSTM, *, compiled: bool = True) -> list[Contender]:
    """The kernel first, then its peers."""
    return [Fused(rule), Eager(rule), *([Compiled(rule)] if compiled else [])]


def make_problem(
    contender: Contender, rule: CoordinatewiseLSTM, n: int, seed: int, *, backward: bool = False
) -> Problem:
    """Random inputs, the same ones for every contender: gradients of 1e-6 to 1e1, a state as a run leaves it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    size = (rule.num_layers, n, rule.hidden_size)
    params, grads = normal(n), normal(n) * 10 ** (normal(n).clamp(-3, 1) * 2)
    state = contender.pack(normal(*size).tanh(), normal(*size))
    if not backward:
        return Problem(contender, params, grads, state, [])
    for tensor in (params, *contender.tensors(state)):
        tensor.requires_grad_()
    cotangents = [normal(n), *contender.tensors(contender.pack(normal(*size), normal(*size)))]
    return Problem(contender, params, grads, state, cotangents)


def check_agreement(problems: Sequence[Problem], *, backward: bool = False) -> float:
    """:func:`largest_error` over one step of every contender, or over its gradients with ``backward``."""
    return largest_error({problem.contender.name: _results(problem, backward) for problem in problems})


def _results(problem: Problem, backward: bool) -> list[Tensor]:
    contender = problem.contender
    if not backward:
        params, state = problem.forward()
        return [params, *contender.unpack(state)]
    params, *rest = problem.forward_backward()
    count = len(contender.tensors(problem.state))
    rebuilt = _rebuild(contender, problem.state, rest[:count])
    return [params, *contender.unpack(rebuilt), *rest[count:]]


def _rebuild(contender: Contender, state: Any, tensors: Sequence[Tensor]) -> Any:
    """A state of the same type as ``state``, made of ``tensors``."""
    if isinstance(state, LSTMState):
        return LSTMState(tensors[0], state.num_coordinates)
    return [(tensors[i], tensors[i + 1]) for i in range(0, len(tensors), 2)]
