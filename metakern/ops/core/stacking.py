"""Weights with a leading axis of copies: parts of one call that each have weights of their own, in one launch.

The kernels for that have no gradient, and there are none for GPUs: :func:`kernel_of_copies` tells where they serve a
call. Elsewhere each copy takes a call of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from metakern.core.backend import is_compiled, requested
from metakern.core.transforms import is_transformed_or_dual
from metakern.ops.core.checks import check_value
from metakern.ops.core.define_op import Kernel, Operator


def kernel_of_copies(operator: Operator, backend: str | None, tensors: Iterable[Tensor]) -> Kernel | None:
    """The kernel that takes all copies in one launch; None where each needs a call of its own.

    Args:
        operator: an operator without a gradient, with kernels for the CPU
        backend: the public functions' argument
        tensors: all of the call
    """
    if requested(backend) not in ("auto", "cpp") or not is_compiled() or is_transformed_or_dual():
        return None
    found = list(tensors)
    if not all(isinstance(x, Tensor) and x.device.type == "cpu" for x in found):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in found):
        return None
    return operator.choose(backend, found[0].device)


def count_copies(weights: Sequence[Tensor], expected: int | None = None) -> int:
    """C, the leading axis of all weights.

    Args:
        weights: [C, *shape] each
        expected: C, if it is known

    Raises:
        ValueError: for weights whose leading axes differ, or are not ``expected``
    """
    shapes = [list(w.shape) for w in weights]
    count = expected if expected is not None else shapes[0][0] if shapes and shapes[0] else 0
    same = bool(shapes) and all(shape[:1] == [count] for shape in shapes)
    check_value(same, "weights must have one leading axis of copies", f", {count}" if count else "", ", got ", shapes)
    return count
