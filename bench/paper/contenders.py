"""The ways to compute one meta-iteration: the gradient of the mean objective over all tasks, by the rule's weights.

All ways take the same steps on the same minibatches from the same starts: K steps of the rule, first order, and the
mean over θ_1 to θ_K of log(f + 1e-3), each f on the minibatch that the rule sees next (f(θ_K) on one more).

A contender is called on a batch of tasks, adds to the weights' ``grad``, and returns the mean losses [T]. Axis legend:
T tasks of one kind, K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from bench.paper.clock import Clock
from bench.paper.plain import Params, loss_of_one, plain
from bench.peers import compile_peer
from metakern.learners import RuleLearner, ScaledRuleLearner

#: Added to losses under the logarithm, as in metakern's objective "log".
OFFSET = 1e-3


def kinds_of(batch: Any) -> list[tuple[str, Any]]:
    """The groups of a batch with the names of their kinds."""
    names = {"DigitsRegression": "regression", "DigitsMLP": "mlp", "DigitsCNN": "cnn", "DigitsRNN": "rnn"}
    return [(names[type(group.problem).__name__], group) for group in batch.groups]


class Sequential:
    """(a) One task after another, op by op: the loss at every step stays in the graph, and its gradient feeds the rule.

    This is the usual loop of public code. The backward of a task's summed objective also goes through the losses again.
    """

    def __init__(self, rule: Any, steps: int, clock: Clock) -> None:
        self.rule, self.steps, self.clock = plain(rule), steps, clock

    def weights(self) -> list[Tensor]:
        """The rule's weights."""
        return self.rule.ordered()

    def __call__(self, batch: Any) -> Tensor:
        """A meta-iteration."""
        found = []
        for kind, group in kinds_of(batch):
            for task in range(group.num_tasks):
                loss = partial(loss_of_one, kind)
                found.append(self._run(group.select(slice(task, task + 1)), loss, batch.num_tasks))
        return torch.stack(found)

    def _run(self, task: Any, loss: Any, number: int) -> Tensor:
        params, values, terms = task.init_params(), [], []
        state = self.rule.init_state(params)
        for step in range(self.steps + 1):
            with self.clock("optimizee"):
                images, labels = task.minibatch()
                at = params if step else {name: p.requires_grad_() for name, p in params.items()}
                value = loss({name: p[0] for name, p in at.items()}, images[0], labels[0])
                if step:
                    values.append(value.detach())
                    terms.append((value + OFFSET).log())
                if step < self.steps:
                    grads = torch.autograd.grad(value, list(at.values()), retain_graph=step > 0)
            if step == self.steps:
                break
            with self.clock("rule"):
                params = {name: p.detach() for name, p in params.items()} if step == 0 else params
                params, state = self.rule(params, dict(zip(params, grads, strict=True)), state)
        with self.clock("backward"):
            (torch.stack(terms).mean() / number).backward()
        return torch.stack(values).mean()


class Batched:
    """(b) The tasks of one kind side by side: losses by vmap, the plain rule on all their coordinates."""

    def __init__(self, rule: Any, steps: int, clock: Clock) -> None:
        self.rule, self.steps, self.clock = plain(rule), steps, clock

    def weights(self) -> list[Tensor]:
        """The rule's weights."""
        return self.rule.ordered()

    def __call__(self, batch: Any) -> Tensor:
        """A meta-iteration."""
        return torch.cat([self._run(kind, group, batch.num_tasks) for kind, group in kinds_of(batch)])

    def _run(self, kind: str, group: Any, number: int) -> Tensor:
        losses_of = vmap(partial(loss_of_one, kind))
        params, values, terms = group.init_params(), [], []
        state = self.rule.init_state(params)
        for step in range(self.steps + 1):
            with self.clock("optimizee"):
                at = params if step else {name: p.requires_grad_() for name, p in params.items()}
                losses = losses_of(at, *group.minibatch())
                if step:
                    values.append(losses.detach())
                    terms.append((losses + OFFSET).log())
                if step < self.steps:
                    grads = torch.autograd.grad(losses.sum(), list(at.values()), retain_graph=step > 0)
            if step == self.steps:
                break
            with self.clock("rule"):
                params = {name: p.detach() for name, p in params.items()} if step == 0 else params
                params, state = self.rule(params, dict(zip(params, grads, strict=True)), state)
        with self.clock("backward"):
            (torch.stack(terms).mean(0).sum() / number).backward()
        return torch.stack(values).mean(0)


class Compiled:
    """(c) torch.compile of (b): one graph for an inner step of each kind, with its backward.

    The graph takes losses and gradients by ``vmap(grad_and_value)`` at detached params; the objective's gradient goes
    back along the gradient that the rule sees anyway, so no loss is differentiated twice.
    """

    def __init__(self, rule: Any, steps: int, clock: Clock) -> None:
        self.rule, self.steps, self.clock = plain(rule), steps, clock
        self._steps: dict[str, Any] = {}

    def weights(self) -> list[Tensor]:
        """The rule's weights."""
        return self.rule.ordered()

    def __call__(self, batch: Any) -> Tensor:
        """A meta-iteration."""
        return torch.cat([self._run(kind, group, batch.num_tasks) for kind, group in kinds_of(batch)])

    def _compiled(self, kind: str) -> Any:
        if kind not in self._steps:
            torch._dynamo.reset()  # a limit of recompilations is shared by all graphs of one code object
            losses_and_grads = vmap(grad_and_value(partial(loss_of_one, kind)))

            def step(params: Params, state: Any, images: Tensor, labels: Tensor) -> Any:
                grads, losses = losses_and_grads({name: p.detach() for name, p in params.items()}, images, labels)
                return losses, _along(grads, params, losses), *self.rule(params, grads, state)

            def last(params: Params, images: Tensor, labels: Tensor) -> Any:
                grads, losses = losses_and_grads({name: p.detach() for name, p in params.items()}, images, labels)
                return losses, _along(grads, params, losses)

            self._steps[kind] = compile_peer(step), compile_peer(last)
        return self._steps[kind]

    def _run(self, kind: str, group: Any, number: int) -> Tensor:
        step, last = self._compiled(kind)
        params, values, terms = group.init_params(), [], []
        state = self.rule.init_state(params)
        for _ in range(self.steps):
            losses, term, params, state = step(params, state, *group.minibatch())
            values.append(losses)
            terms.append(term)
        losses, term = last(params, *group.minibatch())
        (torch.stack([*terms[1:], term]).mean(0).sum() / number).backward()
        return torch.stack([*values[1:], losses]).mean(0)


def _along(grads: Params, params: Params, losses: Tensor) -> Tensor:
    """[T]: its gradient by the params is that of log(f + 1e-3)."""
    products = [(grads[name] * p).flatten(1).sum(1) for name, p in params.items()]
    return torch.stack(products).sum(0) / (losses + OFFSET)


class Fused:
    """(d) metakern: all tasks of all kinds in one RuleLearner."""

    def __init__(self, rule: Any, steps: int, clock: Clock) -> None:
        self.rule, self.clock = rule, clock
        self.learner: Any = self.make(rule, steps)

    def make(self, rule: Any, steps: int) -> Any:
        """The learner."""
        return RuleLearner(rule, steps=steps, unroll=steps)

    def weights(self) -> list[Tensor]:
        """The rule's weights."""
        return list(self.rule.parameters())

    def __call__(self, batch: Any) -> Tensor:
        """A meta-iteration."""
        (losses,) = self.learner.meta_losses(batch)
        with self.clock("backward"):
            losses.mean().backward()
        found: Tensor = losses.detach()
        return found


class FusedInClusters(Fused):
    """(e) metakern, in clusters of the params' shapes: as (d), and every cluster has an output scale of its own."""

    def make(self, rule: Any, steps: int) -> Any:
        """The learner."""
        return ScaledRuleLearner(rule, steps=steps, unroll=steps)


#: The contenders by name, and those that may be left out.
WAYS: dict[str, Callable[..., Any]] = {
    "sequential": Sequential,
    "vmap": Batched,
    "compiled": Compiled,
    "metakern": Fused,
    "metakern, clusters": FusedInClusters,
}
OPTIONAL = ("compiled",)
