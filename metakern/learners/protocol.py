"""What the trainer asks of a meta-learner: losses to minimise, and measures of tasks that it has not trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class MetaLearner(Protocol):
    """An ``nn.Module`` with two methods; its parameters are the meta-parameters."""

    def meta_losses(self, batch: Any) -> Iterator[Tensor]:
        """Losses [T] of a batch of T tasks, one tensor for each outer step.

        The caller takes the mean over the tasks, goes backward and steps the meta-parameters before it asks for the
        next tensor: MAML gives one for a batch, a rule that is trained by truncated backpropagation one for each
        unroll.
        """
        ...

    def evaluate(self, batch: Any) -> dict[str, Tensor]:
        """Measures of every task, [T] each, without a graph: "loss" always, "accuracy" where there are classes."""
        ...
