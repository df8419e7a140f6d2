"""Calls of inner_update whose Triton kernels are launched without a GPU; compile_ahead.py compiles more of them."""

from __future__ import annotations

import torch

from tests.update_problems import make_update


def inner_update() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        make_update(2, "per parameter", dtype, clip_norm=1.0, resting=(1,)).run("triton")


LAUNCHES = {90: (inner_update,)}
