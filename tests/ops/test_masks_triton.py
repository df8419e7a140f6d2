"""Masks of Triton's operators, by the checks of tests/ops/test_masks.py."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs the package triton")

from tests.ops import test_masks as checks

pytestmark = pytest.mark.usefixtures("interpreter_like_a_gpu")

LOSSES = ("mse", "cross_entropy")


@pytest.mark.parametrize("loss", LOSSES)
def test_a_task_without_samples_keeps_its_parameters(loss: str, quick_interpreter: None) -> None:
    checks.check_without_samples("triton", loss, 3)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_task_without_queries_has_a_loss_and_gradients_of_zero(loss: str, quick_interpreter: None) -> None:
    checks.check_without_queries("triton", loss, 3)


def test_masks_of_samples_are_true_for_every_byte_but_0(quick_interpreter: None) -> None:
    checks.check_bytes_of_samples("triton", 3)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_tasks_are_active_for_every_byte_but_0(clip_norm: float | None, quick_interpreter: None) -> None:
    checks.check_bytes_of_active("triton", clip_norm)


def test_steps_are_of_second_order_for_every_byte_but_0(quick_interpreter: None) -> None:
    checks.check_bytes_of_second_order("triton")
