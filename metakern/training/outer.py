"""Outer steps: the meta-gradient of a meta-batch over all processes, and the step along it.

Axis legend: T tasks of the meta-batch, over all processes.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from metakern.training.averaging import MovingAverage
from metakern.training.config import TrainerConfig
from metakern.training.distributed import Processes

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class BatchResult:
    """Result of the outer steps of a meta-batch: mean loss and gradient norm, and a signal to stop, 0 for none."""

    loss: float
    grad_norm: float
    stop: int


class OuterLoop:
    """Runs the outer steps of meta-batches.

    A step with a non-finite loss or meta-gradient is skipped, unless ``config.non_finite`` is "zero".

    Attributes:
        skipped: outer steps skipped so far
    """

    def __init__(
        self,
        learner: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainerConfig,
        processes: Processes,
        average: MovingAverage | None,
    ) -> None:
        self.learner: Any = learner
        self.optimizer, self.config, self.processes, self.average = optimizer, config, processes, average
        self.skipped = self._in_a_row = 0
        device = processes.device
        check_mixed_precision(config.mixed_precision, device)
        dtype = _DTYPES.get(config.mixed_precision or "", torch.bfloat16)
        self.autocast = torch.autocast(device.type, dtype, enabled=config.mixed_precision is not None)
        self._scaler = torch.amp.GradScaler(device.type, enabled=config.mixed_precision == "fp16")

    def run(self, batch: Any, received: Callable[[], int]) -> BatchResult:
        """Run all outer steps of a meta-batch.

        Args:
            batch: the tasks of all processes
            received: returns the stop signal that this process received, 0 for none

        Raises:
            RuntimeError: after ``max_skipped`` consecutive skipped steps, and for a learner whose number of outer steps
                depends on the tasks.
        """
        parts = list(own_parts(batch, self.processes, self.config.batch_parts))
        losses, sizes = [iter(self.learner.meta_losses(part)) for part in parts], [part.num_tasks for part in parts]
        results: list[BatchResult] = []
        while True:
            self.learner.zero_grad()
            loss = self._backward(losses, sizes, batch.num_tasks)
            if loss is None:
                break
            results.append(self._step(loss, len(results), received()))
        if not results:
            raise RuntimeError("meta_losses must give at least one tensor for a batch, got none")
        stop = max(result.stop for result in results)
        return BatchResult(_mean([r.loss for r in results]), _mean([r.grad_norm for r in results]), stop)

    def state_dict(self) -> dict[str, Any]:
        """State as plain data."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row, "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from :meth:`state_dict`."""
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        if state["scaler"] and self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])

    def _backward(self, losses: list[Iterator[Tensor]], sizes: list[int], total: int) -> Tensor | None:
        """Backward of this process's share of the mean loss; returns the share, [1], or None after the last step."""
        ended = 0
        own: list[Tensor] = []
        for part, size in zip(losses, sizes, strict=True):
            with self.autocast:
                values = next(part, None)
            if values is None:
                ended += 1
                continue
            if values.shape != (size,):
                raise ValueError(f"meta_losses must give one loss a task, [{size}], got {list(values.shape)}")
            loss = values.sum() / total
            self._scaler.scale(loss).backward()
            own.append(loss.detach())
        if ended not in (0, len(losses)):
            raise RuntimeError("meta_losses must give as many tensors for every part of a batch, got fewer for some")
        return (
            torch.stack(own).sum(0, keepdim=True, dtype=torch.promote_types(own[0].dtype, torch.float32))
            if own
            else None
        )

    def _step(self, loss: Tensor, position: int, received: int) -> BatchResult:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        flags = loss.new_tensor([position, received == signal.SIGINT, received == signal.SIGTERM])
        figures = self.processes.sum_gradients(parameters, torch.cat([loss, flags]))
        grads = [p.grad for p in parameters if p.grad is not None]
        if not grads:
            raise RuntimeError("the losses of meta_losses must depend on parameters of the optimizer, got none that do")
        if self._scaler.is_enabled():
            self._scaler.unscale_(self.optimizer)
        zeroes = self.config.non_finite == "zero"
        if zeroes:
            for grad in grads:
                grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        if self.config.max_grad_element is not None:
            clip_grad_value_(parameters, self.config.max_grad_element)
        norm = get_total_norm(grads)
        total, positions, *stops, norm_value = torch.cat([figures, norm.to(figures).view(1)]).tolist()
        if positions != position * self.processes.world:
            raise RuntimeError("meta_losses must give as many tensors in every process, got fewer in some")
        finite = zeroes or (abs(total) < float("inf") and norm_value < float("inf"))
        if finite:
            if self.config.max_grad_norm is not None:
                clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            self._in_a_row = 0
        if self._scaler.is_enabled():
            self._scaler.update()
        if not finite:
            self._skip(total, norm_value)
        stop = next((int(s) for s, asked in zip((signal.SIGINT, signal.SIGTERM), stops, strict=True) if asked), 0)
        return BatchResult(total, norm_value, stop)

    def _skip(self, loss: float, norm: float) -> None:
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.config.max_skipped:
            rates = ", ".join(f"{float(group['lr']):.3g}" for group in self.optimizer.param_groups if "lr" in group)
            raise RuntimeError(
                f"{self._in_a_row} outer steps in a row had a loss or meta-gradient that is not finite (the last: loss "
                f"{loss}, norm of the meta-gradient {norm}) and were skipped: lower the optimizer's lr ({rates}) or "
                f"the learner's inner one, set max_grad_norm ({self.config.max_grad_norm}), or look for NaN and "
                "infinity in the tasks"
            )


def check_mixed_precision(precision: str | None, device: torch.device) -> None:
    """Raise RuntimeError unless the device supports this mixed precision."""
    if precision == "fp16" and device.type != "cuda":
        raise RuntimeError(f"mixed_precision fp16 must run on a GPU, got device {device}; the CPU has bf16")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise RuntimeError(
            f"mixed_precision bf16 must run on a GPU that has it, got {torch.cuda.get_device_name(device)}"
        )
    if precision is not None and not torch.amp.is_autocast_available(device.type):
        raise RuntimeError(f"mixed_precision {precision} must run on a device with autocast, got {device}")


def own_parts(batch: Any, processes: Processes, parts: int) -> Iterator[Any]:
    """Share of the tasks for this rank, in chunks, on its device; a batch without ``to`` is not moved."""
    share = processes.share(batch.num_tasks)
    tasks = share.stop - share.start
    parts = min(parts, tasks)
    for part in range(parts):
        own = slice(share.start + tasks * part // parts, share.start + tasks * (part + 1) // parts)
        some = batch if tasks == batch.num_tasks and parts == 1 else batch.select(own)
        yield some.to(processes.device) if hasattr(some, "to") else some


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
