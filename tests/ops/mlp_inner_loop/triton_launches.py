"""Calls of mlp_inner_loop and mlp_meta_loss whose Triton kernels are launched and compiled without a GPU."""

from __future__ import annotations

import torch

from tests.mlp_problems import Case


def mlp_regression() -> None:
    """The sinusoids of Finn et al. 2017."""
    Case([1, 40, 40, 1], 3, 10, 10).meta("triton", torch.float32, steps=5)


def mlp_classification() -> None:
    """Everything that is optional, in one of the 16-bit dtypes."""
    case = Case([16, 16, 5], 300, 5, 15, "cross_entropy", own=True)
    case.params[1] = case.params[1][0]
    lr = [torch.full((2, *(p.shape if i == 1 else p.shape[1:])), 0.1) for i, p in enumerate(case.params)]
    masks = {f"{name}_mask": torch.ones(300, n, dtype=torch.bool) for name, n in (("support", 5), ("query", 15))}
    case.meta("triton", torch.bfloat16, lr=lr, steps=2, per_step=True, activation="gelu", **masks)


def mlp_adaptation() -> None:
    """By clipped gradients, with layers of several activations."""
    case = Case([3, 20, 9, 2], 2, loss="binary_cross_entropy_with_logits")
    case.adapt("triton", steps=3, activation=["sigmoid", "leaky_relu:0.1"], clip_norm=1.0)


#: The kernel of clipped gradients and several activations has the most phases, 264 bytes and some room.
STACK = {"inner_loop_kernel": 288}

LAUNCHES = {90: (mlp_regression, mlp_classification, mlp_adaptation), 100: (mlp_regression,)}
