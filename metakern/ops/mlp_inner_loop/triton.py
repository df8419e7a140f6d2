"""mlp_inner_loop by Triton kernels: launches, and the operators.

One launch runs whole inner loops and their backward; meta-gradients take one or two more, which sum over the tasks in a
fixed order. Results do not depend on the programs' order.

The results of private layout, the trajectory and the tasks' gradients, are [T, ...] in the arithmetic dtype,
zero-padded to the size that they have in every implementation. Other results have the params' dtype.

Axis legend: T tasks, S support and Q query samples of a task, K inner steps, P parameters of a task, R rates. Needs the
package triton, 3.6 or newer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from metakern.core.memo import constant
from metakern.ops.core.checks import check_dtype, check_same_device, check_shape, check_value
from metakern.ops.core.triton_launch import Config, launch, split
from metakern.ops.mlp_inner_loop.arguments import Arguments
from metakern.ops.mlp_inner_loop.autograd import adapt, adapt_backward, meta_loss, meta_loss_backward
from metakern.ops.mlp_inner_loop.triton_arguments import (
    TASK_LANES,
    Network,
    Samples,
    on_device,
    starts,
    table,
)
from metakern.ops.mlp_inner_loop.triton_kernels import (
    inner_loop_kernel,
    own_gradients_kernel,
    partial_sums_kernel,
    shared_gradients_kernel,
)

#: Warps per program, and programs per multiprocessor: further tasks wait, so that scratch memory stays in the cache.
NUM_WARPS, PROGRAMS = 4, 4

#: Number of programs without a GPU (Triton's interpreter).
PROGRAMS_ON_CPU = 2

#: Sums over the tasks: tasks and columns per block, and maximum tasks per program.
SUM_TASKS, SUM_COLUMNS, SUM_CHUNK = 32, 32, 256


def _arithmetic(params: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if params[0].dtype == torch.float64 else torch.float32


@functools.cache
def _most_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_ON_CPU
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def _block(largest: int) -> int:
    """Block size for samples or units: tl.dot needs at least 16, and blocks of 32 by 32 still fit the registers."""
    return 16 if largest <= 16 else 32


class _Loop:
    """Arguments and memory for one launch of whole inner loops."""

    def __init__(self, arguments: Arguments, x: Tensor, y: Tensor, mask: Tensor | None, second_order: Tensor) -> None:
        self.arguments, self.network = arguments, Network(arguments, x)
        self.like = arguments.params[0]
        self.dtype = _arithmetic(arguments.params)
        self.support = self.samples("support", x, y, mask)
        check_shape(second_order, "second_order", [arguments.steps])
        check_dtype(second_order, "second_order", torch.bool)
        self.second_order = on_device(second_order, torch.uint8, self.like.device)
        self.params = [p.contiguous() for p in arguments.params]
        self.rates = [r.reshape(-1) for r in arguments.lr]
        self.segments = -(-arguments.steps // arguments.checkpoint_every)
        self.flat = self.network.params + sum(r.numel() for r in self.rates)

    def samples(self, name: str, x: Tensor, y: Tensor, mask: Tensor | None) -> Samples:
        return self.network.samples(name, self.arguments.loss, x, y, mask, self.like)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.like.new_empty(shape, dtype=dtype or self.dtype)

    def padded(self, elements: int) -> Tensor:
        """Memory of ``elements`` per task, uninitialized, followed by zeros up to TASK_LANES tasks."""
        tasks = self.network.tasks
        result = self.empty(-(-tasks // TASK_LANES) * TASK_LANES * elements)
        result[tasks * elements :].zero_()
        return result

    def run(
        self,
        ends: Sequence[Tensor] = (),
        checkpoints: Tensor | None = None,
        adjoints: Tensor | None = None,
        query: Samples | None = None,
        step_weights: Tensor | None = None,
        totals: Tensor | None = None,
    ) -> None:
        a, network = self.arguments, self.network
        unused = self.like  # placeholder for a tensor that is not read
        queries = 0 if query is None else query.x.shape[1]
        most = max(self.support.x.shape[1], queries)
        programs = min(network.tasks, _most_programs(self.like.device))
        back = adjoints is not None and query is not None
        if back:
            checkpoints = self.empty(programs * self.segments * network.params)
        size = self._work_size(queries, a.checkpoint_every if adjoints is not None else 1)
        work = self.empty(programs * size)
        losses = unused if query is None else self.empty(a.steps * network.tasks)
        rates = self.rates[0] if len(self.rates) == 1 else torch.cat(self.rates) if self.rates else unused
        sets = [self.support, query or self.support]
        (x, y, mask), (query_x, query_y, query_mask) = ((s.x, s.y, unused if s.mask is None else s.mask) for s in sets)
        launch(
            inner_loop_kernel,
            programs,
            Config(0, NUM_WARPS),
            *(x, y, mask, tuple(self.params), tuple(ends or self.params), query_x, query_y, query_mask),
            *(rates.contiguous(), self.second_order, unused if step_weights is None else step_weights),
            *(losses, unused if totals is None else totals, unused if checkpoints is None else checkpoints),
            *(unused if adjoints is None else adjoints, work, table(network, a, self.like.device)),
            *(network.tasks, self.support.x.shape[1], queries, a.steps, a.checkpoint_every),
            *(len(network.widths) - 1, network.units, network.params, self.flat, network.widths[0], network.outputs),
            *(size, *split(a.rate, a.clip_norm or 0.0)),
            ACTIVATION=network.activation,
            LOSS=a.loss,
            QUERY=query is not None,
            BACKWARD=adjoints is not None,
            KEEP=checkpoints is not None,
            RATED=bool(self.rates),
            CLIPS=a.clip_norm is not None,
            MASKED=self.support.mask is not None,
            QUERY_MASKED=query is not None and query.mask is not None,
            TENSORS=len(self.params),
            SHARED=network.shared,
            BS=_block(most),
            BU=_block(max(network.widths)),
            OP=triton.next_power_of_2(network.outputs),
        )

    def _work_size(self, queries: int, span: int) -> int:
        """Elements of a program's scratch memory that holds ``span`` steps; inner_loop_kernel lists its contents."""
        network, samples = self.network, self.support.x.shape[1]
        size = (2 * span + 2) * network.params
        size += 4 * network.units * ((span + 1) * samples + queries) + (samples + queries) * network.widths[0]
        # The kernels use 32-bit indices within one task.
        most = max(size, self.segments * network.params, self.flat)
        check_value(most < 2**31, "a task must take less than 2^31 elements of scratch, got ", most)
        return size


def _gradients(
    network: Network, arguments: Arguments, values: Tensor, weights: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of params and rates: adjoints [T, P + R] times weights [T], summed over tasks that share a tensor."""
    count = len(network.sizes)
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (*arguments.params, *arguments.lr)]
    sizes = [*network.sizes, *(rate.numel() for rate in arguments.lr)]
    rows, length = network.tasks, sum(sizes)
    blocks, config = triton.cdiv(length, SUM_COLUMNS), Config(0, NUM_WARPS)
    targets: Any = (tuple(outs), starts(sizes, values.device))
    # Without weights, an unread placeholder.
    rows_of: Any = (values, values if weights is None else weights.contiguous())
    constants = {"WEIGHTED": weights is not None, "OUTS": len(outs), "BC": SUM_COLUMNS}
    own = sum(1 << i for i in range(count) if not network.shared >> i & 1)
    shared = ((1 << len(outs)) - 1) & ~own
    if own:
        launch(own_gradients_kernel, rows * blocks, config, *rows_of, *targets, length, blocks, **constants, CHOSEN=own)
    if shared and rows > SUM_CHUNK:
        chunks = triton.cdiv(rows, SUM_CHUNK)
        sums = values.new_empty(chunks * length)
        cut = {"WEIGHTED": weights is not None, "BT": SUM_TASKS, "BC": SUM_COLUMNS}
        numbers = (rows, SUM_CHUNK, length, blocks)
        launch(partial_sums_kernel, chunks * blocks, config, *rows_of, sums, *numbers, **cut)
        rows_of, rows, constants["WEIGHTED"] = (sums, sums), chunks, False
    if shared:
        cut = {"CHOSEN": shared, "BT": SUM_TASKS}
        launch(shared_gradients_kernel, blocks, config, *rows_of, *targets, rows, length, **constants, **cut)
    return outs[:count], outs[count:]


# -------------------------------------------------------------------------------------------------------- operators
#
# Opaque to torch.compile, as nothing around them would fuse with them.


@adapt.triton_kernel
def mlp_inner_loop_triton(a: Any) -> tuple[list[Tensor], Tensor]:
    """Parameters of T MLPs after K gradient steps.

    float32, float64, or bfloat16 and float16 with float32 arithmetic; the trajectory is in the arithmetic dtype.
    A label out of range makes its task's loss and gradients NaN.
    """
    loop = _Loop(a, a.x, a.y, a.mask, a.second_order)
    network = loop.network
    trajectory = loop.padded(loop.segments * network.params if a.keep else 0)
    shapes = [p.shape[-2 + i % 2 :] for i, p in enumerate(a.params)]
    ends = [loop.empty(network.tasks, *shape, dtype=a.params[0].dtype) for shape in shapes]
    loop.run(ends, trajectory if a.keep else None)
    return ends, trajectory


@adapt_backward.triton_kernel
def mlp_inner_loop_triton_backward(a: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of params and rates, given the gradients of the adapted parameters."""
    loop = _Loop(a, a.x, a.y, a.mask, a.second_order)
    network, count, wanted = loop.network, len(a.grad_adapted), len(a.params)
    check_value(count == wanted, "grad_adapted must hold one tensor for each of params, ", wanted, ", got ", count)
    for index, (grad, size) in enumerate(zip(a.grad_adapted, network.sizes, strict=True)):
        name, fits = f"grad_adapted[{index}]", grad.numel() == network.tasks * size
        check_value(fits, name, " must have the shape of the adapted tensor, got ", grad.shape)
        check_same_device(grad, name, a.x, "support_x")
    _check_private("trajectory", a.trajectory, loop, loop.segments * network.params)
    adjoints = loop.empty(network.tasks * loop.flat)
    loop.run([g.contiguous() for g in a.grad_adapted], a.trajectory.contiguous(), adjoints)
    return _gradients(network, a, adjoints, None)


@meta_loss.triton_kernel
def mlp_meta_loss_triton(a: Any) -> tuple[Tensor, Tensor]:
    """Query losses [T] and, with ``with_grads``, the gradient of each in the arithmetic dtype."""
    loop = _Loop(a, a.x, a.y, a.mask, a.second_order)
    query = loop.samples("query", a.query_x, a.query_y, a.query_mask)
    check_shape(a.step_weights, "step_weights", [a.steps])
    step_weights = on_device(a.step_weights, loop.dtype, a.x.device)
    totals = loop.empty(loop.network.tasks, dtype=a.params[0].dtype)
    task_grads = loop.padded(loop.flat if a.with_grads else 0)
    loop.run((), None, task_grads if a.with_grads else None, query, step_weights, totals)
    return totals, task_grads


@meta_loss_backward.triton_kernel
def mlp_meta_loss_triton_backward(a: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of params and rates: the tasks' gradients, weighted and summed."""
    arguments = Arguments(a.params, a.lr, 0.0, a.steps, a.per_step, -1, [0], a.loss, 1)
    loop = _Loop(arguments, a.x, a.y, None, constant((True,) * a.steps, torch.bool, a.x.device))
    check_shape(a.grad_losses, "grad_losses", [loop.network.tasks])
    _check_private("task_grads", a.task_grads, loop, loop.flat)
    return _gradients(loop.network, arguments, a.task_grads.contiguous(), a.grad_losses)


def _check_private(name: str, values: Tensor, loop: _Loop, elements: int) -> None:
    fits = values.numel() == -(-loop.network.tasks // TASK_LANES) * TASK_LANES * elements
    check_value(fits, name, " must be the one of this problem, got ", values.numel(), " elements")
    check_dtype(values, name, loop.dtype)
    check_same_device(values, name, loop.like, "params[0]")
