"""The operators task_conv2d, task_conv2d_input and task_conv2d_weight: gradient formulas and batching rules.

Each formula calls the other two operators, so derivatives of any order exist.

Axis legend: T tasks, S samples, C channels of x, O channels of y, [H, W] and [Ho, Wo] their images, [kh, kw] kernel.
"""

from __future__ import annotations

from typing import Any

from metakern.ops.core.batching import Batch
from metakern.ops.core.define_op import Gradient, define_op
from metakern.ops.core.functions import Backward
from metakern.ops.task_conv2d import reference

_OPTIONS: dict[str, Any] = {"backends": ("cpp", "triton"), "triton": "metakern.ops.task_conv2d.triton"}


def _conv_gradients(backward: Backward) -> dict[str, Any]:
    a, grad, wants, found = backward.arguments, backward.grads.y, backward.wants, {}
    if "x" in wants:
        found["x"] = backward.call(conv_input, grad, a.weight, list(a.x.shape[3:]), a.stride, a.padding)
    if "weight" in wants or "bias" in wants:
        kernel = list(a.weight.shape[3:])
        found["weight"], found["bias"] = backward.call(conv_weight, a.x, grad, kernel, a.stride, a.padding)
        if a.bias is None:
            del found["bias"]
    return found


def _input_gradients(backward: Backward) -> dict[str, Any]:
    a, grad, wants, found = backward.arguments, backward.grads.grad_x, backward.wants, {}
    if "grad" in wants:
        found["grad"] = backward.call(conv, grad, a.weight, None, a.stride, a.padding)
    if "weight" in wants:
        kernel = list(a.weight.shape[3:])
        found["weight"], _ = backward.call(conv_weight, grad, a.grad, kernel, a.stride, a.padding)
    return found


def _weight_gradients(backward: Backward) -> dict[str, Any]:
    """The gradients by weight and bias come in where these stand in task_conv2d."""
    a, grads, wants, found = backward.arguments, backward.grads, backward.wants, {}
    if "x" in wants:
        size = list(a.x.shape[3:])
        found["x"] = backward.call(conv_input, a.grad, grads.grad_weight, size, a.stride, a.padding)
    if "grad" in wants:
        found["grad"] = backward.call(conv, a.x, grads.grad_weight, grads.grad_bias, a.stride, a.padding)
    return found


def _batched(batch: Batch) -> tuple[Any, Any]:
    """The batch becomes more tasks; more samples where the weights are shared."""
    batch.check_not_empty()
    images = {"x", "grad"} & set(batch.arguments._fields)
    if len(images) == 1 and not batch.has_axis("weight") and not _has_biases(batch):
        (name,) = images
        x = batch.leading(name).movedim(0, 1)  # [T, B, S, ...]
        merged = batch.call(*batch.arguments._replace(**{name: x.flatten(1, 2)}))
        return [y.unflatten(1, x.shape[1:3]) for y in merged], [1] * len(merged)
    names = [name for name in ("x", "grad", "weight", "bias") if getattr(batch.arguments, name, None) is not None]
    tensors = {name: batch.leading(name) for name in names}
    tasks = tensors[names[0]].shape[:2]
    merged = batch.call(*batch.arguments._replace(**{name: x.flatten(0, 1) for name, x in tensors.items()}))
    return [y.unflatten(0, tasks) for y in merged], [0] * len(merged)


def _has_biases(batch: Batch) -> bool:
    """Whether the bias has a batch axis."""
    return getattr(batch.arguments, "bias", None) is not None and batch.has_axis("bias")


def _out(a: Any) -> list[Any]:
    axes = zip(a.x.shape[3:], a.weight.shape[3:], a.stride, a.padding, strict=True)
    return [reference.output_size(*axis) for axis in axes]


conv = define_op(
    "task_conv2d(Tensor x, Tensor weight, Tensor? bias, int[2] stride, int[2] padding) -> Tensor",
    results=("y",),
    shapes=lambda a: a.x.new_empty((*a.x.shape[:2], a.weight.shape[1], *_out(a))),
    gradient=Gradient(_conv_gradients, of=("x", "weight", "bias"), saves=("x", "weight"), shapes=("bias",)),
    batching=_batched,
    reference=reference.task_conv2d,
    **_OPTIONS,
)

conv_input = define_op(
    "task_conv2d_input(Tensor grad, Tensor weight, int[2] size, int[2] stride, int[2] padding) -> Tensor",
    results=("grad_x",),
    shapes=lambda a: a.grad.new_empty((*a.grad.shape[:2], a.weight.shape[2], *a.size)),
    gradient=Gradient(_input_gradients, of=("grad", "weight"), saves=("grad", "weight")),
    batching=_batched,
    reference=reference.task_conv2d_input,
    **_OPTIONS,
)

conv_weight = define_op(
    "task_conv2d_weight(Tensor x, Tensor grad, int[2] kernel, int[2] stride, int[2] padding) -> (Tensor, Tensor)",
    results=("grad_weight", "grad_bias"),
    shapes=lambda a: (
        a.x.new_empty((a.x.shape[0], a.grad.shape[2], a.x.shape[2], *a.kernel)),
        a.x.new_empty((a.x.shape[0], a.grad.shape[2])),
    ),
    gradient=Gradient(_weight_gradients, of=("x", "grad"), saves=("x", "grad")),
    batching=_batched,
    reference=reference.task_conv2d_weight,
    **_OPTIONS,
)
