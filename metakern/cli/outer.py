"""Settings of the outer loop, shared by all training commands: outer optimizer, schedule, trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from metakern.cli.common import choose, group
from metakern.cli.training import LAST_RATE, cosine
from metakern.core.text import quoted
from metakern.training import TrainerConfig
from metakern.training.config import NON_FINITE

#: Outer optimizers by name; Adam is fused, as on many small tensors it would otherwise take longer than the kernels.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamw": partial(torch.optim.AdamW, fused=True),
    "rmsprop": torch.optim.RMSprop,
    # As Wichrowska et al. 2017, arXiv 1703.04813, train a hierarchical RNN.
    "rmsprop-0.9": partial(torch.optim.RMSprop, alpha=0.9, eps=1e-20),
    "sgd": torch.optim.SGD,
}


OUTER = group("Outer loop")
EVALUATION = group("Evaluation and checkpoints")
MACHINE = group("Machine and draws")


@dataclass(frozen=True)
class OuterSettings:
    """Outer-loop settings of every training command; each command's settings inherit them."""

    count: ClassVar[str] = "iterations"  # the setting for a run's length
    old_names: ClassVar[Mapping[str, str]] = {
        "lr": "outer_lr", "clip_norm": "max_grad_norm", "precision": "mixed_precision",
        "accumulate": "batch_parts",
    }  # fmt: skip

    optimizer: Annotated[str, OUTER(help=f"Outer optimizer: {', '.join(OPTIMIZERS)}.")] = "adam"
    outer_lr: Annotated[float, OUTER(help="Outer learning rate.")] = 1e-3
    scheduler: Annotated[str, OUTER(help=f"cosine: the outer rate falls to {LAST_RATE:.0%}; or none.")] = "cosine"
    decay_iterations: Annotated[
        int | None, OUTER(min=1, help="Iterations in which the cosine falls; default: all of the run's.")
    ] = None
    max_grad_norm: Annotated[float, OUTER(min=0, help="Largest norm of a meta-gradient; 0: no limit.")] = 0.0
    max_grad_element: Annotated[
        float, OUTER(min=0, help="Largest element of a meta-gradient in size, limited first; 0: no limit.")
    ] = 0.0
    non_finite: Annotated[
        str, OUTER(help="Meta-gradients that are not finite: skip the outer step, or take such elements as zero.")
    ] = "skip"
    batch_parts: Annotated[int, OUTER(min=1, help="Parts that a meta-batch is computed in, one after another.")] = 1
    ema: Annotated[float, OUTER(min=0, max=1, help="Decay of averaged weights, as 0.99; 0: no averages.")] = 0.0
    mixed_precision: Annotated[str | None, OUTER(help="bf16 or fp16 where the device has it.")] = None
    max_skipped: Annotated[
        int, OUTER(min=1, help="Outer steps in a row that are not finite, and skipped, before the run stops.")
    ] = 10
    monitor: Annotated[str, EVALUATION(help="The measure that chooses the best weights: loss or accuracy.")] = "loss"
    patience: Annotated[
        int, EVALUATION(min=0, help="Evaluations in a row without a better one before the run stops; 0: never.")
    ] = 0
    eval_every: Annotated[int, EVALUATION(min=1, help="Iterations between evaluations.")] = 100
    eval_tasks: Annotated[int, EVALUATION(min=2, help="Validation tasks of an evaluation.")] = 256
    checkpoint_every: Annotated[int, EVALUATION(min=1, help="Iterations between checkpoints.")] = 100
    keep: Annotated[int, EVALUATION(min=1, help="Checkpoints kept, beside the best.")] = 3
    seed: Annotated[int, MACHINE(help="Decides weights and draws.")] = 0
    threads: Annotated[int, MACHINE(min=0, help="Threads of the CPU; 0: as torch chooses.")] = 0
    device: Annotated[str, MACHINE(help="cpu, cuda, or auto.")] = "auto"

    def meaningless(self) -> Iterator[tuple[Sequence[str], str]]:
        """Settings that have no effect with the others, and why, naming the other option."""
        if self.scheduler == "none":
            yield ("decay_iterations",), "with --scheduler none; --scheduler cosine falls in them"

    def check_outer(self, *measures: str) -> None:
        """Raise ValueError for unknown names, invalid rates, and a measure that these tasks lack."""
        choose("optimizer", self.optimizer, tuple(OPTIMIZERS))
        choose("scheduler", self.scheduler, ("cosine", "none"))
        choose("non_finite", self.non_finite, NON_FINITE)
        choose("monitor", self.monitor, measures)
        device_of(self.device)
        if not 0 < self.outer_lr < math.inf:
            raise ValueError(f"outer_lr must be positive and finite, got {self.outer_lr}")

    def make_optimizer(self, learner: nn.Module) -> torch.optim.Optimizer:
        """The outer optimizer."""
        return OPTIMIZERS[self.optimizer](learner.parameters(), lr=self.outer_lr)

    def make_scheduler(self, optimizer: torch.optim.Optimizer, iterations: int) -> LRScheduler | None:
        """Schedule of the outer learning rate, constant after ``decay_iterations``; None for no schedule."""
        return cosine(optimizer, self.decay_iterations or iterations) if self.scheduler == "cosine" else None

    def describe_schedule(self) -> str:
        """Describe a schedule whose length differs from the run's; empty otherwise."""
        iterations, decay = getattr(self, self.count), self.decay_iterations
        if self.scheduler != "cosine" or decay in (None, iterations):
            return ""
        rest = f", and stays at {LAST_RATE:.0%} from there on" if iterations > decay else ""
        return f"the outer learning rate falls over {decay} {self.count}{rest}"

    def trainer_config(self, iterations: int, num_tasks: int) -> TrainerConfig:
        """Configuration for the trainer; 0 becomes None where it means "off"."""
        return TrainerConfig(
            iterations=iterations,
            num_tasks=num_tasks,
            seed=self.seed,
            max_grad_norm=self.max_grad_norm or None,
            max_grad_element=self.max_grad_element or None,
            non_finite=self.non_finite,
            batch_parts=self.batch_parts,
            eval_every=self.eval_every,
            eval_tasks=self.eval_tasks,
            patience=self.patience or None,
            ema=self.ema or None,
            monitor=self.monitor,
            mixed_precision=self.mixed_precision,
            max_skipped=self.max_skipped,
            checkpoint_every=self.checkpoint_every,
            keep=self.keep,
            device=device_of(self.device),
        )


def device_of(name: str) -> str:
    """Resolve a device name; "auto" takes a GPU if torch finds one.

    Raises:
        ValueError: for a GPU if torch finds none, and for other kinds of devices.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or auto, got {quoted(name)}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name} needs a GPU, and torch finds none: --device cpu")
    return name
