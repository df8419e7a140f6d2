# mypy: disable-error-code="no-untyped-def"
"""Kernels of mlp_inner_loop: one program runs the inner loops of its tasks in turn; and sums over the tasks.

One launch takes all K steps and the way back through them. A program has scratch of its own in global memory, small
enough for the cache; triton_pass.py says how its threads share it. Widths, numbers of samples and of
steps are no compile-time constants: a compiled kernel serves every network of as many layers and as large blocks.

Axis legend: T tasks; S support and Q query samples of a task; K inner steps; P parameters of a task, R rates that
receive gradients; U units of all layers. A segment is the steps between two parameters that are kept. Arguments that
travel together: ``net`` is (table, layers, U), ``data`` one set of a task (x, y, mask, factor, samples), ``alphas``
(rates [R], the rate where there are none, and the norm at which gradients are clipped with CLIPS).
"""

from __future__ import annotations

import triton
import triton.language as tl

from metakern.ops.core.triton_arithmetic import scalar
from metakern.ops.mlp_inner_loop.triton_functions import BLOCK, copy, loss_pass, loss_tangent_pass, mean_factor
from metakern.ops.mlp_inner_loop.triton_pass import (
    ADAPTED,
    OFFSET,
    PER_PARAMETER,
    SIZE,
    SLOT,
    STEP,
    backward_pass,
    entry,
    forward_pass,
    gradient_pass,
    tangent_backward_pass,
    tangent_forward_pass,
)

#: Arguments on whose values kernels must not be specialized.
_NUMBERS = (
    "tasks", "support_samples", "query_samples", "steps", "every", "layers", "units", "params_size", "flat", "inputs",
    "outputs", "work_size", "rate", "rate_low", "clip", "clip_low",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ elementwise phases


@triton.jit
def clipping(gradient, net, alphas):
    """min(1, c / ‖g‖) for the gradient g of all adapted tensors, and 1 / ‖g‖ if it is clipped, else 0.

    Computed in float64, which holds every square of a float32.
    """
    table, layers, _units = net
    norm = alphas[2]
    total = tl.zeros([BLOCK], tl.float64)
    for tensor in range(2 * layers):
        offset, size = entry(table, tensor, OFFSET), entry(table, tensor, SIZE)
        count = tl.where(entry(table, tensor, ADAPTED) != 0, size, 0)
        for start in range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            g = tl.load(gradient + offset + i, mask=i < count, other=0.0).to(tl.float64)
            total += g * g
    square = tl.sum(total, axis=0)
    length = tl.sqrt(square)
    fits = square <= norm * norm  # false for NaN
    like = gradient.dtype.element_ty
    return tl.where(fits, 1.0, norm / length).to(like), tl.where(fits, 0.0, 1 / length).to(like)


@triton.jit
def update_phase(now, new, gradient, coefficient, step, net, alphas, RATED: tl.constexpr, CLIPS: tl.constexpr):
    """θ' = θ − α g; with CLIPS g is scaled by its coefficient. Tensors that are not adapted keep their bits."""
    table, layers, _units = net
    rates, rate, _norm = alphas
    for tensor in range(2 * layers):
        offset, size = entry(table, tensor, OFFSET), entry(table, tensor, SIZE)
        adapted, per = entry(table, tensor, ADAPTED) != 0, entry(table, tensor, PER_PARAMETER)
        slot = entry(table, tensor, SLOT) + step * entry(table, tensor, STEP)
        for start in range(0, size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            theta = tl.load(now + offset + i, mask=i < size, other=0.0)
            g = tl.load(gradient + offset + i, mask=i < size, other=0.0)
            if CLIPS:
                g *= coefficient
            alpha = rate
            if RATED:
                alpha = tl.load(rates + slot + i * per, mask=i < size, other=0.0).to(g.dtype)
            tl.store(new + offset + i, tl.where(adapted, theta - alpha * g, theta), mask=i < size)
    tl.debug_barrier()


@triton.jit
def direction_phase(
    adjoint, grad_rates, gradient, coefficient, direction, step, net, alphas,
    RATED: tl.constexpr, CLIPS: tl.constexpr,
):  # fmt: skip
    """Write the direction −α ⊙ adjoint for the Hessian product (zero if not adapted), and add to the gradients of α.

    With CLIPS returns ⟨direction, gradient⟩, for :func:`clip_direction_phase`.
    """
    table, layers, _units = net
    rates, rate, _norm = alphas
    along = tl.zeros([BLOCK], tl.float64)
    for tensor in range(2 * layers):
        offset, size = entry(table, tensor, OFFSET), entry(table, tensor, SIZE)
        adapted, per = entry(table, tensor, ADAPTED) != 0, entry(table, tensor, PER_PARAMETER)
        slot = entry(table, tensor, SLOT) + step * entry(table, tensor, STEP)
        own_rates = tl.where(adapted & (per != 0), size, 0)
        total = tl.zeros([BLOCK], adjoint.dtype.element_ty)
        for start in range(0, size, BLOCK):
            i = start + tl.arange(0, BLOCK)
            v = tl.load(adjoint + offset + i, mask=i < size, other=0.0)
            if RATED:
                alpha = tl.load(rates + slot + i * per, mask=i < size, other=0.0).to(v.dtype)
                g = tl.load(gradient + offset + i, mask=i < size, other=0.0)
                if CLIPS:
                    g *= coefficient
                product = v * g
                total += product
                at = grad_rates + slot + i
                tl.store(at, tl.load(at, mask=i < own_rates, other=0.0) - product, mask=i < own_rates)
            else:
                alpha = rate
            moved = tl.where(adapted, -alpha * v, 0.0)
            tl.store(direction + offset + i, moved, mask=i < size)
            if CLIPS:
                g = tl.load(gradient + offset + i, mask=i < tl.where(adapted, size, 0), other=0.0)
                along += tl.where(i < size, moved.to(tl.float64) * g.to(tl.float64), 0.0)
        if RATED:
            whole = tl.sum(total, axis=0)
            if adapted & (per == 0):
                tl.store(grad_rates + slot, tl.load(grad_rates + slot) - whole)
            tl.debug_barrier()  # the next tensor may have the same rate
    tl.debug_barrier()
    return tl.sum(along, axis=0)


@triton.jit
def clip_direction_phase(direction, gradient, along, coefficient, inverse, net):
    """Apply the derivative of clipping to the direction d: c / ‖g‖ (d − ⟨d, g⟩ g / ‖g‖²)."""
    table, layers, _units = net
    share = tl.where(inverse == 0, 0.0, along * inverse.to(tl.float64)).to(inverse.dtype)
    for tensor in range(2 * layers):
        offset, size = entry(table, tensor, OFFSET), entry(table, tensor, SIZE)
        count = tl.where(entry(table, tensor, ADAPTED) != 0, size, 0)
        for start in range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            g = tl.load(gradient + offset + i, mask=i < count, other=0.0)
            d = tl.load(direction + offset + i, mask=i < count, other=0.0)
            tl.store(direction + offset + i, coefficient * (d - share * (inverse * g)), mask=i < count)
    tl.debug_barrier()


@triton.jit
def gather(sources, task, target, table, TENSORS: tl.constexpr, SHARED: tl.constexpr):
    """Gather a task's parameters from TENSORS tensors into one row; bit i of SHARED: tensor i has no task axis."""
    for tensor in tl.static_range(TENSORS):
        size = entry(table, tensor, SIZE)
        first = task * 0 if SHARED >> tensor & 1 else task * size
        copy(sources[tensor] + first, target + entry(table, tensor, OFFSET), size)
    tl.debug_barrier()


@triton.jit
def scatter(source, task, targets, table, TENSORS: tl.constexpr):
    """The inverse of :func:`gather`, into tensors with a task axis."""
    for tensor in tl.static_range(TENSORS):
        size = entry(table, tensor, SIZE)
        copy(source + entry(table, tensor, OFFSET), targets[tensor] + task * size, size)
    tl.debug_barrier()


@triton.jit
def clear(target, size):
    """Write zeros."""
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(target + i, tl.zeros([BLOCK], target.dtype.element_ty), mask=i < size)
    tl.debug_barrier()


# --------------------------------------------------------------------------------------------- one step, there and back


@triton.jit
def loss_phases(
    theta, record, data, outputs, net,
    ACTIVATION: tl.constexpr, LOSS: tl.constexpr, MASKED: tl.constexpr,
    BS: tl.constexpr, BU: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """The loss of one set; fills the record except for the gradients below the last layer."""
    x, y, mask, factor, samples = data
    last, top = (net[2] - outputs) * samples, (4 * net[2] - outputs) * samples
    forward_pass(theta, x, record, samples, net, ACTIVATION, BS, BU)
    loss = loss_pass(record + last, record + top, y, mask, factor, samples, outputs, LOSS, MASKED, OP)
    tl.debug_barrier()
    return loss


@triton.jit
def gradient_phases(
    theta, record, out, factor, data, net,
    ACTIVATION: tl.constexpr, ADD: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """``out`` (+)= factor · the gradient of the record's loss."""
    x, samples = data[0], data[4]
    backward_pass(theta, record, samples, net, ACTIVATION, BS, BU)
    deltas = record + 3 * net[2] * samples
    gradient_pass(out, factor, x, deltas, record, record, samples, net, ADD, False, BS, BU)


@triton.jit
def hessian_phases(
    theta, direction, adjoint, record, tangents, data, outputs, net,
    ACTIVATION: tl.constexpr, LOSS: tl.constexpr, MASKED: tl.constexpr,
    BS: tl.constexpr, BU: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """Add the Hessian of the loss times ``direction`` to ``adjoint``."""
    x, _y, mask, factor, samples = data
    last, top = (net[2] - outputs) * samples, (4 * net[2] - outputs) * samples
    tangent_forward_pass(theta, direction, x, record, tangents, samples, net, ACTIVATION, BS, BU)
    loss_tangent_pass(
        record + last, tangents + last, tangents + top, mask, factor, samples, outputs, LOSS, MASKED, OP
    )  # fmt: skip
    tl.debug_barrier()
    tangent_backward_pass(theta, direction, record, tangents, samples, net, ACTIVATION, BS, BU)
    deltas = tangents + 3 * net[2] * samples
    gradient_pass(adjoint, 1.0, x, deltas, record, tangents, samples, net, True, True, BS, BU)


@triton.jit
def begin_segment(
    thetas, checkpoint, visit, segments, last_size, params_size,
    QUERY: tl.constexpr, BACKWARD: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Set the parameters before a segment's first step, from the end of the previous one or from a checkpoint."""
    if (visit >= segments) | (BACKWARD and not QUERY):
        copy(checkpoint, thetas, params_size)
    else:
        if BACKWARD and visit > 0:
            copy(thetas + last_size, thetas, params_size)
            tl.debug_barrier()
        if KEEP:
            copy(thetas, checkpoint, params_size)
    tl.debug_barrier()


@triton.jit
def add_losses(losses, step_weights, task, tasks, steps):
    """The weighted sum of a task's losses [K, T] over the steps, in order; losses of zero weight are not read."""
    total = tl.load(step_weights) * 0
    for step in range(steps):
        weight = tl.load(step_weights + step)
        total += weight * tl.load(losses + tl.cast(step, tl.int64) * tasks + task, mask=weight != 0, other=0.0)
    return total


# ------------------------------------------------------------------------------------------------- many steps and tasks


@triton.jit
def load_set(
    x, y, mask, target, task, samples, inputs, outputs, LOSS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """One set of a task as the tuple ``data``; its x are copied to ``target`` in the arithmetic dtype."""
    copy(x + task * samples * inputs, target, samples * inputs)
    counts = mask + task * samples
    factor = mean_factor(counts, target, samples, outputs, LOSS, MASKED)
    return target, y + task * samples * (1 if LOSS == 1 else outputs), counts, factor, samples


@triton.jit
def forward_step(
    step, slot, scratch, support, outputs, net, alphas,
    ACTIVATION: tl.constexpr, LOSS: tl.constexpr, RATED: tl.constexpr, CLIPS: tl.constexpr, MASKED: tl.constexpr,
    BS: tl.constexpr, BU: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """Inner step number ``step``, which is number ``slot`` of its segment."""
    thetas, gradients, records, _direction, _tangents, theta_size, record_size = scratch
    now, gradient = thetas + slot * theta_size, gradients + slot * theta_size
    record = records + slot * record_size
    loss_phases(now, record, support, outputs, net, ACTIVATION, LOSS, MASKED, BS, BU, OP)
    gradient_phases(now, record, gradient, 1.0, support, net, ACTIVATION, False, BS, BU)
    coefficient = 1.0
    if CLIPS:
        coefficient = clipping(gradient, net, alphas)[0]
    update_phase(now, now + theta_size, gradient, coefficient, step, net, alphas, RATED, CLIPS)


@triton.jit
def query_step(
    theta, record, adjoint, loss, weight, query, outputs, net,
    ACTIVATION: tl.constexpr, LOSS: tl.constexpr, MASKED: tl.constexpr, BACKWARD: tl.constexpr,
    BS: tl.constexpr, BU: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """Query loss after a step of nonzero weight; BACKWARD adds its gradient times the weight to ``adjoint``."""
    if weight != 0:
        tl.store(loss, loss_phases(theta, record, query, outputs, net, ACTIVATION, LOSS, MASKED, BS, BU, OP))
        if BACKWARD:
            gradient_phases(theta, record, adjoint, weight, query, net, ACTIVATION, True, BS, BU)


@triton.jit
def backward_step(
    step, slot, second, adjoint, grad_rates, scratch, support, outputs, net, alphas,
    ACTIVATION: tl.constexpr, LOSS: tl.constexpr, RATED: tl.constexpr, CLIPS: tl.constexpr, MASKED: tl.constexpr,
    BS: tl.constexpr, BU: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """Turn the adjoint of the parameters after a step into the adjoint of the parameters before it."""
    thetas, gradients, records, direction, tangents, theta_size, record_size = scratch
    gradient = gradients + slot * theta_size
    if CLIPS:
        coefficient, inverse = clipping(gradient, net, alphas)
        along = direction_phase(
            adjoint, grad_rates, gradient, coefficient, direction, step, net, alphas, RATED, CLIPS
        )  # fmt: skip
        clip_direction_phase(direction, gradient, along, coefficient, inverse, net)
    else:
        direction_phase(adjoint, grad_rates, gradient, 1.0, direction, step, net, alphas, RATED, CLIPS)
    if second != 0:
        theta, record = thetas + slot * theta_size, records + slot * record_size
        hessian_phases(
            theta, direction, adjoint, record, tangents, support, outputs, net,
            ACTIVATION, LOSS, MASKED, BS, BU, OP,
        )  # fmt: skip


@triton.jit
def backward_segment(
    first, last, second_order, step_weights, losses, tasks, adjoint, grad_rates, scratch, query_record,
    support, query, outputs, net, alphas,
    ACTIVATION: tl.constexpr, LOSS: tl.constexpr, QUERY: tl.constexpr, RATED: tl.constexpr, CLIPS: tl.constexpr,
    MASKED: tl.constexpr, QUERY_MASKED: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """Go back through the steps ``first`` to ``last`` of a segment; ``losses`` are the task's column of [K, T]."""
    for done in range(first, last):
        step = last - 1 - (done - first)
        if QUERY:
            query_step(
                scratch[0] + (step - first + 1) * scratch[5], query_record, adjoint,
                losses + tl.cast(step, tl.int64) * tasks, tl.load(step_weights + step), query,
                outputs, net, ACTIVATION, LOSS, QUERY_MASKED, True, BS, BU, OP,
            )  # fmt: skip
        backward_step(
            step, step - first, tl.load(second_order + step), adjoint, grad_rates, scratch,
            support, outputs, net, alphas, ACTIVATION, LOSS, RATED, CLIPS, MASKED, BS, BU, OP,
        )  # fmt: skip


@triton.jit
def divide_scratch(thetas, span, params_size, record_size, theta_size, BACKWARD: tl.constexpr):
    """The tuple ``scratch``: a program's memory from ``thetas`` on, for a segment of ``span`` steps."""
    gradients = thetas + (span + 1) * params_size
    direction = gradients + span * params_size
    records = direction + params_size
    tangents = records + span * record_size
    return thetas, gradients, records, direction, tangents, theta_size, record_size if BACKWARD else 0


@triton.jit(do_not_specialize=_NUMBERS)
def inner_loop_kernel(
    x, y, mask, initial, ends, query_x, query_y, query_mask, rates, second_order, step_weights,
    losses, totals, checkpoints, adjoints, work, table,
    tasks, support_samples, query_samples, steps, every, layers, units, params_size, flat, inputs, outputs, work_size,
    rate, rate_low, clip, clip_low,
    ACTIVATION: tl.constexpr, LOSS: tl.constexpr, QUERY: tl.constexpr, BACKWARD: tl.constexpr, KEEP: tl.constexpr,
    RATED: tl.constexpr, CLIPS: tl.constexpr, MASKED: tl.constexpr, QUERY_MASKED: tl.constexpr,
    TENSORS: tl.constexpr, SHARED: tl.constexpr, BS: tl.constexpr, BU: tl.constexpr, OP: tl.constexpr,
):  # fmt: skip
    """Run the inner loops of every num_programs-th task.

    With QUERY: writes ``totals`` [T] of the query ``losses`` [K, T], and with BACKWARD also their gradients,
    ``adjoints`` [T, P + R]. With BACKWARD alone: writes adjoints, given ``checkpoints`` and in ``ends`` the gradients
    of the adapted parameters. Without both: writes the adapted parameters to ``ends``, and with KEEP ``checkpoints``
    [T, segments, P].
    """
    alpha = scalar(rate, rate_low, tl.zeros([1], work.dtype.element_ty))
    net, alphas = (table, layers, units), (rates, alpha, scalar(clip, clip_low, tl.zeros([1], tl.float64)))
    segments = (steps + every - 1) // every
    # For the backward all steps of a segment are held; otherwise every step overwrites the one before.
    span, theta_size = (every, params_size) if BACKWARD else (1, 0)
    record_size = 4 * units * support_samples
    thetas = work + tl.program_id(0).to(tl.int64) * work_size
    scratch = divide_scratch(thetas, span, params_size, record_size, theta_size, BACKWARD)
    query_record = scratch[4] + record_size
    support_x = query_record + 4 * units * query_samples
    for index in range(tl.program_id(0), tasks, tl.num_programs(0)):
        task = tl.cast(index, tl.int64)
        adjoint = adjoints + task * flat
        kept = checkpoints + (tl.program_id(0).to(tl.int64) if QUERY else task) * segments * params_size
        support = load_set(x, y, mask, support_x, task, support_samples, inputs, outputs, LOSS, MASKED)
        query = support
        if QUERY:
            query_target = support_x + support_samples * inputs
            query = load_set(
                query_x, query_y, query_mask, query_target, task, query_samples, inputs, outputs, LOSS, QUERY_MASKED
            )  # fmt: skip
        if BACKWARD:
            clear(adjoint, flat)
        if BACKWARD and not QUERY:
            gather(ends, task, adjoint, table, TENSORS, 0)
        else:
            gather(initial, task, thetas, table, TENSORS, SHARED)
        # Forward through the segments; then backward from the last, whose steps are still held, to the first.
        for visit in range(segments - 1 if BACKWARD and not QUERY else 0, 2 * segments - 1 if BACKWARD else segments):
            first = tl.where(visit < segments, visit, 2 * segments - 2 - visit) * every
            last = tl.minimum(first + every, steps)
            begin_segment(
                thetas, kept + first // every * params_size, visit, segments, every * params_size, params_size,
                QUERY, BACKWARD, KEEP,
            )  # fmt: skip
            for step in range(first, last):
                forward_step(
                    step, step - first, scratch, support, outputs, net, alphas,
                    ACTIVATION, LOSS, RATED, CLIPS, MASKED, BS, BU, OP,
                )  # fmt: skip
                if QUERY and not BACKWARD:
                    query_step(
                        thetas + (step - first + 1) * theta_size, query_record, adjoint,
                        losses + tl.cast(step, tl.int64) * tasks + task, tl.load(step_weights + step), query,
                        outputs, net, ACTIVATION, LOSS, QUERY_MASKED, False, BS, BU, OP,
                    )  # fmt: skip
            if BACKWARD:
                backward_segment(
                    first, tl.where(visit >= segments - 1, last, first), second_order, step_weights, losses + task,
                    tasks, adjoint, adjoint + params_size, scratch, query_record, support, query, outputs, net, alphas,
                    ACTIVATION, LOSS, QUERY, RATED, CLIPS, MASKED, QUERY_MASKED, BS, BU, OP,
                )  # fmt: skip
        if QUERY:
            tl.debug_barrier()
            tl.store(totals + task, add_losses(losses, step_weights, task, tasks, steps).to(totals.dtype.element_ty))
        elif not BACKWARD:
            scatter(thetas, task, ends, table, TENSORS)


# ------------------------------------------------------------------------------------------------- sums over the tasks


@triton.jit
def sum_rows(
    values, weights, first, end, columns, length, WEIGHTED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Weighted sums [BC] of the rows ``first`` to ``end`` of values [rows, length], in fixed order."""
    total = tl.zeros([BC], values.dtype.element_ty)
    for start in range(first, end, BT):
        row = start + tl.arange(0, BT)
        inside = (row < end)[:, None] & (columns < length)[None, :]
        v = tl.load(values + row.to(tl.int64)[:, None] * length + columns[None, :], mask=inside, other=0.0)
        if WEIGHTED:
            weight = tl.load(weights + row, mask=row < end, other=0.0).to(v.dtype)
            v = tl.where(inside, v * weight[:, None], 0.0)
        total += tl.sum(v, axis=0)
    return total


@triton.jit
def spread(total, row, columns, outs, starts, OUTS: tl.constexpr, CHOSEN: tl.constexpr):
    """Write the columns of one row to their tensors; bit i of CHOSEN: tensor i is written."""
    for i in tl.static_range(OUTS):
        if CHOSEN >> i & 1:
            start, end = tl.load(starts + i), tl.load(starts + i + 1)
            at = outs[i] + row * (end - start) + (columns - start)
            tl.store(at, total.to(outs[i].dtype.element_ty), mask=(columns >= start) & (columns < end))


@triton.jit(do_not_specialize=("rows", "chunk", "length", "blocks"))
def partial_sums_kernel(
    values, weights, sums, rows, chunk, length, blocks, WEIGHTED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """Sum values [rows, length] in chunks of ``chunk`` rows, to [chunks, length]."""
    part = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    first = part * chunk
    total = sum_rows(values, weights, first, tl.minimum(first + chunk, rows), columns, length, WEIGHTED, BT, BC)
    tl.store(sums + part.to(tl.int64) * length + columns, total, mask=columns < length)


@triton.jit(do_not_specialize=("rows", "length"))
def shared_gradients_kernel(
    values, weights, outs, starts, rows, length,
    WEIGHTED: tl.constexpr, OUTS: tl.constexpr, CHOSEN: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Sum all rows of values [rows, length] into the gradients of shared tensors."""
    columns = tl.program_id(0) * BC + tl.arange(0, BC)
    total = sum_rows(values, weights, 0, rows, columns, length, WEIGHTED, BT, BC)
    spread(total, 0, columns, outs, starts, OUTS, CHOSEN)


@triton.jit(do_not_specialize=("length", "blocks"))
def own_gradients_kernel(
    values, weights, outs, starts, length, blocks,
    WEIGHTED: tl.constexpr, OUTS: tl.constexpr, CHOSEN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the weighted rows of values [T, length] to the gradients of per-task tensors [T, ...]."""
    task = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    v = tl.load(values + task * length + columns, mask=columns < length, other=0.0)
    if WEIGHTED:
        v *= tl.load(weights + task).to(v.dtype)
    spread(v, task, columns, outs, starts, OUTS, CHOSEN)
