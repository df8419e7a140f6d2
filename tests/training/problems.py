"""A small learner with every kind of state that resuming must restore, and its tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metakern.tasks import Episodes
from metakern.training import Callback, Record, Trainer, TrainerConfig
from tests.conftest import assert_same_bits


class Lines:
    """y = a·x + b with a and b of a task's own; a split is another b. Float64, so that sums can be compared closely."""

    def __init__(self, split: str = "train") -> None:
        self.offset = {"train": 0.0, "valid": 0.5, "test": 1.0}[split]

    def sample(self, num_tasks: int, generator: torch.Generator) -> Episodes:
        numbers = torch.randn(num_tasks, 14, 2, generator=generator, dtype=torch.float64)
        x, slope = numbers[:, 2:], numbers[:, :2, :1]
        y = (x @ slope) + self.offset
        return Episodes(x[:, :6], y[:, :6], x[:, 6:], y[:, 6:])

    def split(self, name: str) -> Lines:
        return Lines(name)


class CountedLines(Lines):
    """Lines with a state of their own: targets grow with the tasks that were drawn to train on."""

    def __init__(self, split: str = "train") -> None:
        super().__init__(split)
        self.drawn = 0

    def sample(self, num_tasks: int, generator: torch.Generator) -> Episodes:
        self.drawn += num_tasks if self.offset == 0 else 0
        tasks = super().sample(num_tasks, generator)
        return Episodes(tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y * (1 + self.drawn / 100))

    def split(self, name: str) -> CountedLines:
        return CountedLines(name)

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


class Learner(nn.Module):
    """A network with dropout that sees the mean of the support set's targets; two outer steps a batch by default.

    Attributes:
        unused: a parameter that never has a gradient
        seen: a buffer, the tasks so far
        centres: extra state, drawn anew every second iteration, which shifts the losses
    """

    def __init__(self, outer_steps: int = 2, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(7)  # every instance starts from the same weights, in every process
        self.body = nn.Linear(3, 4, dtype=torch.float64)
        self.head = nn.Linear(4, 1, dtype=torch.float64)
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.outer_steps, self.dropout = outer_steps, dropout
        self.centres = [0.0, 0.0]

    def on_iteration(self, iteration: int, tasks: Lines, generator: torch.Generator) -> None:
        if iteration % 2 == 0:
            self.centres = torch.rand(2, generator=generator).tolist()

    def get_extra_state(self) -> dict[str, Any]:
        return {"centres": list(self.centres)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.centres = list(state["centres"])

    def predict(self, batch: Episodes, dropout: float) -> Tensor:
        context = batch.support_y.mean(1, keepdim=True).expand(-1, batch.query_x.shape[1], -1)
        hidden = self.body(torch.cat([batch.query_x, context], 2)).tanh()
        return self.head(nn.functional.dropout(hidden, dropout))

    def losses(self, batch: Episodes, dropout: float = 0.0) -> Tensor:
        return (self.predict(batch, dropout) - batch.query_y + sum(self.centres)).square().mean((1, 2))

    def meta_losses(self, batch: Episodes) -> Iterator[Tensor]:
        self.seen += batch.num_tasks
        for _ in range(self.outer_steps):
            yield self.losses(batch, self.dropout)

    @torch.no_grad()
    def evaluate(self, batch: Episodes) -> dict[str, Tensor]:
        prediction = self.predict(batch, 0.0)
        close = (prediction - batch.query_y).abs() < 0.5
        return {"loss": self.losses(batch), "accuracy": close.to(torch.float32).mean((1, 2))}


class Events(Callback):
    """Records a trainer's events, and may act at an iteration."""

    def __init__(self, act: Callable[[Trainer, Record], Any] | None = None) -> None:
        self.events: list[Any] = []
        self.act = act

    def on_start(self, trainer: Trainer) -> None:
        self.events.append("start")

    def on_iteration(self, trainer: Trainer, record: Record) -> None:
        self.events.append(record.iteration)
        if self.act:
            self.act(trainer, record)

    def on_evaluation(self, trainer: Trainer, measures: dict[str, float]) -> None:
        self.events.append(sorted(measures))

    def on_checkpoint(self, trainer: Trainer, path: Any) -> None:
        self.events.append(path.name)

    def on_end(self, trainer: Trainer, history: Any, error: BaseException | None) -> None:
        self.events.append(type(error).__name__)


#: Settings that enable every kind of state that resuming must restore.
FULL: dict[str, Any] = {
    "iterations": 6,
    "num_tasks": 5,
    "batch_parts": 2,
    "eval_every": 3,
    "eval_tasks": 7,
    "checkpoint_every": 2,
    "max_grad_norm": 0.5,
    "ema": 0.9,
}


def make_trainer(
    folder: Any = None,
    *,
    learner: nn.Module | None = None,
    tasks: Lines | None = None,
    scheduled: bool = True,
    callbacks: Sequence[Callback] = (),
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    **settings: Any,
) -> Trainer:
    """A trainer of :class:`Learner` with :data:`FULL` settings, except given ones.

    It writes only checkpoints: figures and events would take most of the time.
    """
    learner = learner or Learner()
    steps = optimizer(learner.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(steps, 6) if scheduled else None
    config = TrainerConfig(**{**FULL, **settings})
    trainer = Trainer(learner, tasks or CountedLines(), steps, config, scheduler=schedule, folder=folder)
    trainer.callbacks = tuple(callbacks)
    return trainer


def assert_same_state(actual: Any, expected: Any, name: str = "state") -> None:
    """Fail unless both trees hold the same bits; timings may differ."""
    if isinstance(expected, Tensor):
        assert_same_bits(name, actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), name
        for key in expected.keys() - {"seconds", "tasks_per_second"}:
            assert_same_state(actual[key], expected[key], f"{name}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), name
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same_state(*pair, f"{name}[{index}]")
    else:
        assert actual == expected, f"{name}: {actual!r} is not {expected!r}"


def meta_gradient(trainer: Trainer, batch: Episodes) -> list[Tensor | None]:
    """The gradient of a batch's first outer step, before clipping, by parameter."""
    taken: list[list[Tensor | None]] = []
    handle = trainer.optimizer.register_step_pre_hook(
        lambda *_: taken.append([None if p.grad is None else p.grad.clone() for p in trainer.learner.parameters()])
    )
    trainer._outer.run(batch, lambda: 0)
    handle.remove()
    return taken[0]
