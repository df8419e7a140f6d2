"""The outer loop: meta-training of update rules by truncated backpropagation through time.

Andrychowicz et al. 2016, arXiv 1606.04474, section 3: T problems are solved side by side for some steps; every
``unroll`` steps the rule's weights take a step of their own along the gradient of the losses met on the way, and
parameters and state are carried on, detached.

Axis legend: T problems, P parameters of one problem; all T·P coordinates take their step in one launch.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metakern.tasks import OptimizeeBatch, Optimizees

#: What an unroll minimises, summed over its steps: f, or log(f + 1e-3), which weighs the small losses at the end up.
OBJECTIVES = ("sum", "log")
_LOG_OFFSET = 1e-3

#: Meta-gradients that are not finite, one after another, before training stops.
MAX_SKIPPED = 10


@dataclass(frozen=True)
class MetaTrainingConfig:
    """How a rule is meta-trained.

    Attributes:
        num_tasks: T, problems solved side by side
        steps: inner steps of an episode
        unroll: inner steps between two outer steps; divides ``steps``
        lr: Adam's learning rate for the rule's weights, decayed to 3 % of itself along half a cosine
        objective: one of :data:`OBJECTIVES`
        second_order: also differentiate through the gradients that the rule receives
        clip_norm: largest norm of a meta-gradient
        eval_every: episodes between two evaluations; the rule with the best one is kept
        eval_tasks: problems of an evaluation
        seed: decides all draws
    """

    num_tasks: int = 8
    steps: int = 100
    unroll: int = 20
    lr: float = 1e-2
    objective: str = "log"
    second_order: bool = False
    clip_norm: float = 1.0
    eval_every: int = 5
    eval_tasks: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_tasks", "steps", "unroll", "eval_every", "eval_tasks"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps % self.unroll:
            raise ValueError(f"unroll must divide steps, {self.steps}, got {self.unroll}")
        for name in ("lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")


@dataclass
class Episode:
    """What one episode showed: mean loss of its last minibatches, seconds it took, outer steps skipped."""

    loss: float
    seconds: float
    skipped: int


@dataclass
class History:
    """Every episode, and every evaluation as (episodes before it, mean final loss)."""

    episodes: list[Episode] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The lowest evaluation."""
        return min((loss for _, loss in self.evaluations), default=math.inf)


class MetaTrainer:
    """Meta-trains a rule on a distribution of problems, keeping the best weights by evaluation on held-out data.

    Args:
        rule: an update rule: ``init_state(params)`` and ``forward(params, grads, state)``; trained in place
        problems: the distribution; its "train" split trains, its "valid" split decides which weights are kept
        config: see :class:`MetaTrainingConfig`

    Example:
        >>> trainer = MetaTrainer(CoordinatewiseLSTM(), DigitsMLP())
        >>> history = trainer.fit(60)
    """

    def __init__(self, rule: nn.Module, problems: Optimizees, config: MetaTrainingConfig | None = None) -> None:
        self.rule: Any = rule
        self.config = config or MetaTrainingConfig()
        self.train_problems, self.valid_problems = problems.split("train"), problems.split("valid")
        self.optimizer = torch.optim.Adam(rule.parameters(), self.config.lr)
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self._skipped_in_a_row = 0

    def fit(self, episodes: int, on_episode: Callable[[Episode, History], None] | None = None) -> History:
        """Train for some episodes and leave the best weights in the rule.

        Args:
            episodes: how many; each has ``steps / unroll`` outer steps
            on_episode: called after each with it and the history so far

        Raises:
            RuntimeError: after :data:`MAX_SKIPPED` meta-gradients in a row that are not finite, and where no evaluation
                gave a finite loss.
        """
        if episodes < 1:
            raise ValueError(f"episodes must be at least 1, got {episodes}")
        history = History()
        best = copy.deepcopy(self.rule.state_dict())
        for index in range(episodes):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * (0.03 + 0.97 * (1 + math.cos(math.pi * index / episodes)) / 2)
            history.episodes.append(self.run_episode())
            if (index + 1) % self.config.eval_every == 0 or index + 1 == episodes:
                loss = self.evaluate()
                if loss < history.best:
                    best = copy.deepcopy(self.rule.state_dict())
                history.evaluations.append((index + 1, loss))
            if on_episode:
                on_episode(history.episodes[-1], history)
        self.rule.load_state_dict(best)
        if not math.isfinite(history.best):
            raise RuntimeError(f"no evaluation gave a finite loss; the rule is as it was. Lower lr ({self.config.lr})")
        return history

    def run_episode(self) -> Episode:
        """Solve T fresh problems once, with an outer step every ``unroll`` inner steps."""
        start = time.perf_counter()
        problems = self.train_problems.sample(self.config.num_tasks, self.generator)
        params = problems.init_params()
        state = self.rule.init_state(params)
        skipped = 0
        for _ in range(self.config.steps // self.config.unroll):
            params, state, losses, meta_loss = self._unroll(problems, params, state)
            skipped += not self._outer_step(meta_loss)
        return Episode(losses.mean().item(), time.perf_counter() - start, skipped)

    def meta_gradient(self) -> list[Tensor]:
        """The meta-gradient of one unroll on fresh problems, one tensor for each of the rule's weights; none moves."""
        problems = self.train_problems.sample(self.config.num_tasks, self.generator)
        params = problems.init_params()
        *_, meta_loss = self._unroll(problems, params, self.rule.init_state(params))
        return list(torch.autograd.grad(meta_loss, list(self.rule.parameters())))

    def _unroll(self, problems: OptimizeeBatch, params: Tensor, state: Any) -> tuple[Tensor, Any, Tensor, Tensor]:
        """``unroll`` inner steps from detached params and state; returns new ones, the last losses, the meta-loss.

        The meta-loss has the gradient of Σ_t f(θ_t), not its value: the gradient of f at θ_t, which the rule needs
        anyway, times θ_t. So no minibatch is differentiated twice.
        """
        params = params.detach()
        state = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, state)
        meta_loss = params.new_zeros(())
        for step in range(self.config.unroll + 1):
            losses, grads = self._gradients(problems, params)
            if step:  # θ_0 does not depend on the rule
                weight = 1.0 if self.config.objective == "sum" else 1 / (losses + _LOG_OFFSET).unsqueeze(1)
                meta_loss = meta_loss + (grads.detach() * weight * params).sum()
            if step < self.config.unroll:
                params, state = self.rule(params, grads, state)
        return params, state, losses, meta_loss / (self.config.unroll * self.config.num_tasks)

    def _gradients(self, problems: OptimizeeBatch, params: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [T], without a graph, and gradients [T, P], with one if second order is asked for."""
        second_order = self.config.second_order and params.requires_grad
        point = params if second_order else params.detach().requires_grad_()
        losses = problems.loss(point)
        (grads,) = torch.autograd.grad(losses.sum(), point, create_graph=second_order)
        return losses.detach(), grads

    def _outer_step(self, meta_loss: Tensor) -> bool:
        """Step the rule's weights; False, and no step, where the meta-gradient is not finite."""
        self.optimizer.zero_grad()
        meta_loss.backward()
        norm = nn.utils.clip_grad_norm_(self.rule.parameters(), self.config.clip_norm)
        if norm.isfinite():
            self.optimizer.step()
            self._skipped_in_a_row = 0
            return True
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise RuntimeError(
                f"{MAX_SKIPPED} meta-gradients in a row were not finite; lower lr ({self.config.lr}) or clip_norm "
                f"({self.config.clip_norm}), or look at the problems' losses for NaN and infinity"
            )
        return False

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean full loss of validation problems after ``steps`` steps of the rule; every call meets the same draws."""
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        problems = self.valid_problems.sample(self.config.eval_tasks, generator)
        params = problems.init_params()
        state = self.rule.init_state(params)
        for _ in range(self.config.steps):
            with torch.enable_grad():
                _, grads = self._gradients(problems, params)
            params, state = self.rule(params, grads, state)
        loss = problems.full_loss(params).mean().item()
        return loss if math.isfinite(loss) else math.inf
