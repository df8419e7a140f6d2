"""The trainer's interface to a meta-learner: losses to minimise, and measures on evaluation tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class MetaLearner(Protocol):
    """An ``nn.Module`` with two methods; its parameters are the meta-parameters.

    A learner that keeps something from one meta-batch to the next which differs between processes has four more:
    ``set_process(rank, world)``; ``process_state()``, plain data that only this process knows, or None;
    ``set_process_states(states)``, those of all processes, which its extra state then holds; and
    ``without_process_states(state_dict)``, the same without any.

    Example:
        >>> learner = MAMLLearner(mlp(1, 40, 1))
        >>> measures = learner.evaluate(Sinusoid().sample(32, generator))
        >>> measures["loss"].shape
        torch.Size([32])
    """

    def meta_losses(self, batch: Any) -> Iterator[Tensor]:
        """Losses [T] of a batch of T tasks, one tensor for each outer step.

        The caller takes the mean over the tasks, runs the backward and steps the meta-parameters before it asks for the
        next tensor: MAML yields one per batch, a rule trained by truncated backpropagation one per unroll.
        """
        ...

    def evaluate(self, batch: Any) -> dict[str, Tensor]:
        """Measures of every task, [T] each, detached: "loss" always, "accuracy" for classification."""
        ...
