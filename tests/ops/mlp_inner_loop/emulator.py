"""The CUDA kernels of mlp_inner_loop run on the CPU, thread by thread, called as torch.ops.metakern's operators are.

Axis legend: T tasks, K inner steps, P parameters of a task.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metakern.ops.mlp_inner_loop.autograd import Problem, _padded
from tests.cuda.device import DEVICE, DTYPES, Device, Guarded, Library

_LAYERS, _TENSORS, _STEPS = 8, 16, 256
_Pointers = ctypes.c_void_p * _TENSORS
ADAPT, ADAPT_BACKWARD, META_LOSS = range(3)
ALL_STEPS, ONE_STEP, WITHOUT_ADJOINT, NO_WAY_BACK = range(4)


class _Rates(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("step", ctypes.c_int64), ("per_parameter", ctypes.c_bool))


class _Problem(ctypes.Structure):
    _fields_ = (
        ("num_tasks", ctypes.c_int64),
        ("num_layers", ctypes.c_int),
        ("widths", ctypes.c_int * (_LAYERS + 1)),
        ("support_samples", ctypes.c_int),
        ("query_samples", ctypes.c_int),
        ("steps", ctypes.c_int),
        ("activations", ctypes.c_int * _LAYERS),
        ("slopes", ctypes.c_double * _LAYERS),
        ("loss", ctypes.c_int),
        ("is_double", ctypes.c_bool),
        ("shared", ctypes.c_bool * _TENSORS),
        ("adapted", ctypes.c_bool * _TENSORS),
        ("rate", ctypes.c_double),
        ("rates", _Rates * _TENSORS),
        ("checkpoint_every", ctypes.c_int),
        ("clip_norm", ctypes.c_double),
    )


class _Set(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p), ("y", ctypes.c_void_p), ("mask", ctypes.c_void_p))


class _Call(ctypes.Structure):
    _fields_ = (
        ("mode", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("params", _Pointers),
        ("support", _Set),
        ("query", _Set),
        ("adapted", _Pointers),
        ("grad_adapted", _Pointers),
        ("trajectory", ctypes.c_void_p),
        ("task_grads", ctypes.c_void_p),
        ("flat", ctypes.c_int64),
        ("rate_slots", ctypes.c_int64 * _TENSORS),
        ("step_losses", ctypes.c_void_p),
        ("losses", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("second_order", ctypes.c_uint32 * (_STEPS // 32)),
        ("step_weights", ctypes.c_double * _STEPS),
    )


class Plan(ctypes.Structure):
    """A call's use of device resources."""

    _fields_ = (
        ("blocks", ctypes.c_int64),
        ("threads", ctypes.c_int),
        ("shared_bytes", ctypes.c_int64),
        ("scratch_bytes", ctypes.c_int64),
        ("placement", ctypes.c_int),
        ("shared_limit", ctypes.c_int64),
    )


class _Part(ctypes.Structure):
    _fields_ = (
        ("out", ctypes.c_void_p),
        ("first", ctypes.c_int64),
        ("elements", ctypes.c_int64),
        ("shared", ctypes.c_bool),
    )


class _Reduction(ctypes.Structure):
    _fields_ = (
        ("parts", _Part * (2 * _TENSORS)),
        ("num_parts", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("weights", ctypes.c_void_p),
        ("task_grads", ctypes.c_void_p),
        ("flat", ctypes.c_int64),
        ("num_tasks", ctypes.c_int64),
    )


Samples = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Arguments:
    """Arguments shared by the operators of a problem."""

    problem: Problem
    params: Sequence[Tensor]
    lr: Sequence[Tensor]
    support: Samples
    query: Samples | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of arguments and results."""
        return self.params[0].dtype

    @property
    def arithmetic(self) -> torch.dtype:
        """Dtype of internal buffers."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.support[0].shape[0]

    @property
    def sizes(self) -> list[int]:
        """Elements of every tensor of one task."""
        shapes = [p.shape[-2:] if i % 2 == 0 else p.shape[-1:] for i, p in enumerate(self.params)]
        return [shape.numel() for shape in shapes]

    @property
    def flat(self) -> int:
        """Elements of a task's gradients: parameters, then rates."""
        return sum(self.sizes) + sum(r.numel() for r in self.lr)

    def structure(self, memory: Guarded) -> _Problem:
        """As csrc/mlp_inner_loop/problem.h has it; α is copied to ``memory``."""
        p, n = self.problem, len(self.params)
        widths = [self.support[0].shape[2], *(q.shape[-1] for q in self.params[1::2])]
        out = _Problem(self.num_tasks, n // 2, (ctypes.c_int * (_LAYERS + 1))(*widths), self.support[0].shape[1])
        out.query_samples = 0 if self.query is None else self.query[0].shape[1]
        out.steps, out.loss, out.clip_norm = p.steps, p.loss, p.clip_norm or 0
        out.activations, out.slopes = type(out.activations)(*p.activation), type(out.slopes)(*p.slopes)
        out.is_double, out.rate, out.checkpoint_every = self.dtype == torch.float64, p.rate, p.checkpoint_every
        copies = [memory.copy(r) for r in self.lr]
        for i, (q, size) in enumerate(zip(self.params, self.sizes, strict=True)):
            out.shared[i], out.adapted[i] = q.dim() == 2 - i % 2, bool(p.adapted >> i & 1)
            if copies:
                rate = copies[0 if len(copies) == 1 else i]
                own = rate.numel() // (p.steps if p.per_step else 1)
                out.rates[i] = _Rates(rate.data_ptr(), own if p.per_step else 0, own != 1 or size == 1)
        return out

    def call(self, mode: int, memory: Guarded) -> _Call:
        """Arguments of every mode; inputs are copied to ``memory``."""
        out = _Call(mode, DTYPES.index(self.dtype), _Pointers(*(memory.copy(q).data_ptr() for q in self.params)))
        for name, samples in (("support", self.support), ("query", self.query)):
            if samples is not None:
                x, y, mask = samples
                marks = None if mask is None else memory.copy(mask.to(torch.uint8)).data_ptr()
                setattr(out, name, _Set(memory.copy(x).data_ptr(), memory.copy(y).data_ptr(), marks))
        out.flat, slot = self.flat, sum(self.sizes)
        for i in range(_TENSORS):
            out.rate_slots[i] = slot if self.lr else -1
            slot += self.lr[i].numel() if 1 < len(self.lr) > i else 0
        for step, second in enumerate(self.problem.second_order):
            out.second_order[step // 32] |= int(second) << step % 32
        return out


class MlpEmulator:
    """The operators on the emulated device."""

    def __init__(self) -> None:
        self._library = Library("mlp_inner_loop")
        self._library.functions.shared_bytes.restype = ctypes.c_int64

    def shared_bytes(self, arguments: Arguments, placement: int) -> int:
        """Shared memory of a block."""
        return int(self._library.functions.shared_bytes(ctypes.byref(arguments.structure(Guarded())), placement))

    def plan(self, arguments: Arguments, mode: int, with_grads: bool, device: Device = DEVICE) -> Plan:
        """A call's use of resources of ``device``."""
        plan, problem = Plan(), arguments.structure(Guarded())
        flag = ctypes.c_bool(with_grads)
        self._library.call("plan", device, ctypes.byref(problem), mode, flag, ctypes.byref(plan))
        return plan

    def mlp_inner_loop(self, a: Arguments, keep: bool = True, device: Device = DEVICE) -> tuple[list[Tensor], Tensor]:
        """Adapted parameters, and the trajectory where it is kept."""
        memory = Guarded()
        call = a.call(ADAPT, memory)
        lead = (a.num_tasks,)
        shapes = [p.shape[-2:] if i % 2 == 0 else p.shape[-1:] for i, p in enumerate(a.params)]
        results = [memory.like(p.new_empty(*lead, *shape)) for p, shape in zip(a.params, shapes, strict=True)]
        call.adapted = _Pointers(*(r.data_ptr() for r in results))
        checkpoints = -(-a.problem.steps // a.problem.checkpoint_every)
        trajectory = self._private(a, memory, checkpoints * sum(a.sizes) if keep else 0)
        call.trajectory = trajectory.data_ptr() if keep else None
        self._run(a, call, False, memory, device)
        return results, trajectory

    def mlp_inner_loop_backward(
        self, grads: Sequence[Tensor], trajectory: Tensor, a: Arguments, device: Device = DEVICE
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of parameters and rates."""
        memory = Guarded()
        call = a.call(ADAPT_BACKWARD, memory)
        call.grad_adapted = _Pointers(*(memory.copy(g).data_ptr() for g in grads))
        call.trajectory = memory.copy(trajectory).data_ptr()
        task_grads = self._private(a, memory, a.flat)
        call.task_grads = task_grads.data_ptr()
        self._run(a, call, True, memory, device)
        return self._reduce(a, None, task_grads, device)

    def mlp_meta_loss(
        self, a: Arguments, step_weights: Sequence[float], with_grads: bool = True, device: Device = DEVICE
    ) -> tuple[Tensor, Tensor]:
        """Query losses [T], and every task's gradients where they are wanted."""
        memory = Guarded()
        call = a.call(META_LOSS, memory)
        call.step_weights = (ctypes.c_double * _STEPS)(*step_weights)
        losses = memory.like(torch.empty(a.num_tasks, dtype=a.dtype))
        step_losses = memory.like(torch.empty(a.num_tasks, a.problem.steps, dtype=a.arithmetic))
        call.losses, call.step_losses = losses.data_ptr(), step_losses.data_ptr()
        task_grads = self._private(a, memory, a.flat if with_grads else 0)
        call.task_grads = task_grads.data_ptr() if with_grads else None
        self._run(a, call, with_grads, memory, device)
        return losses, task_grads

    def mlp_meta_loss_backward(
        self, grad_losses: Tensor, task_grads: Tensor, a: Arguments, device: Device = DEVICE
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of parameters and rates."""
        return self._reduce(a, grad_losses, task_grads, device)

    @staticmethod
    def _private(a: Arguments, memory: Guarded, elements: int) -> Tensor:
        return memory.like(torch.empty(_padded(a.num_tasks) * elements, dtype=a.arithmetic))

    def _run(self, a: Arguments, call: _Call, with_grads: bool, memory: Guarded, device: Device) -> None:
        plan, problem = self.plan(a, call.mode, with_grads, device), a.structure(memory)
        scratch = memory.like(torch.empty(plan.scratch_bytes, dtype=torch.uint8))
        call.scratch = scratch.data_ptr()
        self._library.call("inner_loop", device, *(ctypes.byref(x) for x in (problem, call, plan)))
        memory.check()

    def _reduce(
        self, a: Arguments, weights: Tensor | None, task_grads: Tensor, device: Device
    ) -> tuple[list[Tensor], list[Tensor]]:
        memory = Guarded()
        out, first = [], 0
        reduction = _Reduction(num_parts=len(a.params) + len(a.lr), dtype=DTYPES.index(a.dtype), flat=a.flat)
        for i, like in enumerate([*a.params, *a.lr]):
            out.append(memory.like(like))
            of_params = i < len(a.params)
            elements = a.sizes[i] if of_params else like.numel()
            shared = not of_params or like.dim() == 2 - i % 2
            reduction.parts[i] = _Part(out[-1].data_ptr(), first, elements, shared)
            first += elements
        reduction.weights = None if weights is None else memory.copy(weights).data_ptr()
        reduction.task_grads, reduction.num_tasks = memory.copy(task_grads).data_ptr(), a.num_tasks
        self._library.call("reduce", device, ctypes.byref(reduction))
        memory.check()
        return out[: len(a.params)], out[len(a.params) :]


@functools.cache
def kernels() -> MlpEmulator:
    """Built once."""
    return MlpEmulator()
