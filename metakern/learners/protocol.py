"""The trainer's interface to a meta-learner: losses to minimise, and measures on evaluation tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class MetaLearner(Protocol):
    """An ``nn.Module`` with two methods; its parameters are the meta-parameters."""

    def meta_losses(self, batch: Any) -> Iterator[Tensor]:
        """Losses [T] of a batch of T tasks, one tensor for each outer step.

        The caller takes the mean over the tasks, runs the backward and steps the meta-parameters before it asks for the
        next tensor: MAML yields one per batch, a rule trained by truncated backpropagation one per unroll.
        """
        ...

    def evaluate(self, batch: Any) -> dict[str, Tensor]:
        """Measures of every task, [T] each, detached: "loss" always, "accuracy" for classification."""
        ...
