"""GPU contenders and their inputs: every variant of the kernels, and their peers.

All read the same random numbers, made on the device and packed once for each layout of the state.

Axis legend: N coordinates, H hidden units, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.gpu_device import Device
from bench.lstm_step.contenders import Contender, Eager, Fused, Problem
from metakern.ops import LSTMState, lstm_step, pack_state
from metakern.ops.lstm_step import PRECISIONS
from metakern.ops.lstm_step.reference import gradient_features
from metakern.rules import CoordinatewiseLSTM

#: Largest relative difference to eager float32, by precision of the products: forward, and forward and backward. In
#: float32 the latter comes from sums over N coordinates in another order.
AGREEMENT = {"highest": (1e-4, 1e-3), "high": (5e-3, 2e-2), "medium": (5e-2, 5e-2)}

#: The same for a state in bfloat16.
BFLOAT16_AGREEMENT = (5e-2, 1e-1)


class GpuContender(Contender, Protocol):
    """One implementation, its tolerance and the size of its state."""

    ours: bool
    layout: str  # contenders with the same layout share packed states
    state_bytes: int  # per number of the state
    agreement: tuple[float, float]
    problem_type: type[Problem]

    def rebuild(self, state: Any, tensors: Sequence[Tensor]) -> Any:
        """A state with the sizes of ``state``, made of ``tensors``."""


class Variant(Fused):
    """metakern.ops.lstm_step by one backend, in one precision, with one dtype of the state."""

    ours = True
    problem_type = Problem

    def __init__(self, rule: CoordinatewiseLSTM, backend: str, precision: str, state_dtype: torch.dtype) -> None:
        super().__init__(rule)
        self.backend, self.precision, self.state_dtype = backend, precision, state_dtype
        self.state_bytes = state_dtype.itemsize
        coarse = state_dtype == torch.bfloat16
        self.name = f"{backend} {precision}{' bf16 state' if coarse else ''}"
        self.layout = f"tiles {state_dtype}"
        self.agreement = BFLOAT16_AGREEMENT if coarse else AGREEMENT[precision]

    def pack(self, h: Tensor, c: Tensor) -> LSTMState:
        """Tiles of 32 coordinates in the dtype of the state."""
        return pack_state(h.to(self.state_dtype), c.to(self.state_dtype))

    def rebuild(self, state: LSTMState, tensors: Sequence[Tensor]) -> LSTMState:
        """The packed tensor."""
        return LSTMState(tensors[0], state.num_coordinates)

    def step(self, params: Tensor, grads: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        """One kernel."""
        return lstm_step(params, grads, state, self.weights, precision=self.precision, backend=self.backend)


class PlainPeer(Eager):
    """Plain PyTorch, launch by launch."""

    ours = False
    layout = "rows"
    state_bytes = 4
    agreement = AGREEMENT["highest"]
    problem_type = Problem

    def __init__(self, rule: CoordinatewiseLSTM) -> None:
        super().__init__(rule)
        self.module.to(rule.head.weight.device)

    def rebuild(self, state: Any, tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(h, c) pairs, one per layer."""
        return [(tensors[i], tensors[i + 1]) for i in range(0, len(tensors), 2)]


class CompiledPeer(PlainPeer):
    """torch.compile of the plain step, specialised to its sizes."""

    name = "compiled"

    def __init__(self, rule: CoordinatewiseLSTM, options: dict[str, Any]) -> None:
        super().__init__(rule)
        self.compiled = torch.compile(self.module, fullgraph=True, dynamic=False, **options)

    def step(self, params: Tensor, grads: Tensor, state: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Any]:
        """The compiled step."""
        result: tuple[Tensor, Any] = self.compiled(params, grads, state)
        return result


class CudnnPeer:
    """nn.LSTM (cuDNN on a GPU) with sequence length 1 and batch size N; the rest in plain operations."""

    ours = False
    layout = "stacked"
    state_bytes = 4

    def __init__(self, rule: CoordinatewiseLSTM, *, tf32: bool) -> None:
        self.name = "cudnn tf32" if tf32 else "cudnn"
        self.agreement = AGREEMENT["high" if tf32 else "highest"]
        self.problem_type = Tf32Problem if tf32 else Problem
        self.lstm, self.head = rule.to_modules()
        self.lstm.flatten_parameters()
        self.weights: list[Tensor] = [*self.lstm.parameters(), *self.head.parameters()]
        self.preprocess, self.scale, self.output_scale = rule.preprocess, rule.preprocess_scale, rule.output_scale

    def pack(self, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """(h, c) as they are."""
        return h.detach(), c.detach()

    def tensors(self, state: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Two."""
        return list(state)

    def unpack(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(h, c) as they are."""
        return state

    def rebuild(self, state: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(h, c)."""
        return tensors[0], tensors[1]

    def step(self, params: Tensor, grads: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        """Preprocessing, cuDNN, head, update."""
        self.lstm.training = torch.is_grad_enabled()  # cuDNN saves nothing for a backward in eval mode
        x = gradient_features(grads, self.preprocess, self.scale)
        y, new_state = self.lstm(x.unsqueeze(0), state)
        return params + self.output_scale * self.head(y.squeeze(0)).squeeze(-1), new_state


@contextmanager
def cudnn_tf32() -> Iterator[None]:
    """Enable TF32 products in cuDNN, torch's default; :mod:`bench.gpu` disables them otherwise."""
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:  # reset at once: torch.compile guards on it and would recompile its peer
        torch.backends.cudnn.allow_tf32 = False


class Tf32Problem(Problem):
    """A problem whose calls run with cuDNN's TF32 products."""

    def forward(self) -> tuple[Tensor, Any]:
        """The step without a graph."""
        with cudnn_tf32():
            return super().forward()

    def forward_backward(self) -> tuple[Tensor, ...]:
        """All gradients."""
        with cudnn_tf32():
            return super().forward_backward()


def make_contenders(rule: CoordinatewiseLSTM, device: Device, *, compiled: bool) -> list[GpuContender]:
    """Eager PyTorch first, the reference for all others; then the other peers and the kernel variants."""
    contenders: list[GpuContender] = [PlainPeer(rule), CudnnPeer(rule, tf32=False), CudnnPeer(rule, tf32=True)]
    if compiled:
        contenders.append(CompiledPeer(rule, device.compile_options))
    precisions = {torch.float32: PRECISIONS, torch.bfloat16: ("highest", "medium")}
    for backend in device.backends:
        for dtype in device.state_dtypes:
            contenders += [Variant(rule, backend, precision, dtype) for precision in precisions[dtype]]
    return contenders


class Inputs:
    """One set of random inputs: gradients of 1e-6 to 1e1, a realistic state, cotangents for a backward."""

    def __init__(self, rule: CoordinatewiseLSTM, n: int, seed: int, device: torch.device, *, backward: bool) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        size = (rule.num_layers, n, rule.hidden_size)
        self.params, self.grads = normal(n), normal(n) * 10 ** (normal(n).clamp(-3, 1) * 2)
        self.state = normal(*size).tanh_(), normal(*size)
        self.cotangents = (normal(n), (normal(*size), normal(*size))) if backward else None
        self.params.requires_grad_(backward)
        self._packed: dict[str, tuple[Any, list[Tensor]]] = {}

    def problem(self, contender: GpuContender) -> Problem:
        """These inputs for one contender."""
        if contender.layout not in self._packed:
            state, cotangents = contender.pack(*self.state), []
            if self.cotangents is not None:
                for tensor in contender.tensors(state):
                    tensor.requires_grad_()
                cotangents = [self.cotangents[0], *contender.tensors(contender.pack(*self.cotangents[1]))]
            self._packed[contender.layout] = state, cotangents
        state, cotangents = self._packed[contender.layout]
        return contender.problem_type(contender, self.params, self.grads, state, cotangents)


def results(problem: Problem, contender: GpuContender, *, backward: bool) -> list[Tensor]:
    """New params, h and c; or the gradients of params, h, c and every weight."""
    if not backward:
        params, state = problem.forward()
        return [params, *contender.unpack(state)]
    params, *rest = problem.forward_backward()
    count = len(contender.tensors(problem.state))
    return [params, *contender.unpack(contender.rebuild(problem.state, rest[:count])), *rest[count:]]
