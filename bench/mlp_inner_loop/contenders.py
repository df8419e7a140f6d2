"""Contenders for a meta-iteration of MAML, behind one interface: metakern, plain PyTorch and other libraries.

A meta-iteration is: all query losses, their mean, backward to the meta-parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import metakern
from bench.mlp_inner_loop.cases import Case, Set
from bench.peers import compile_peer, largest_error

#: Largest relative difference between the results of two contenders in float64.
AGREEMENT = 1e-9


class Contender(Protocol):
    """One way to compute a meta-gradient; its model's parameters are the meta-parameters."""

    model: nn.Module

    def losses(self, support: Set, query: Set) -> Tensor:
        """Query losses [T], after the backward of their mean."""


class Batched:
    """All tasks at once: the query losses [T] in one graph, and one backward."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.model()

    def losses(self, support: Set, query: Set) -> Tensor:
        """Query losses [T], after the backward of their mean."""
        losses = self.query_losses(support, query)
        losses.mean().backward()
        return losses.detach()

    def query_losses(self, support: Set, query: Set) -> Tensor:
        """Query losses [T] with their graph."""
        raise NotImplementedError

    def predictions(self, support: Set, x: Tensor) -> Tensor:
        """Predictions of every task's adapted model on its ``x`` [T, Q, ...]."""
        raise NotImplementedError


class Fused(Batched):
    """metakern.meta_loss."""

    def __init__(self, case: Case, **options: Any) -> None:
        super().__init__(case)
        self.options = case.options | options

    def query_losses(self, support: Set, query: Set) -> Tensor:
        """One call."""
        return metakern.meta_loss(self.model, support, query, **self.options)

    def predictions(self, support: Set, x: Tensor) -> Tensor:
        """metakern.adapt, then a call of the result."""
        predictions: Tensor = metakern.adapt(self.model, *support, **self.case.options)(x)
        return predictions


class OneCall(Fused):
    """metakern.meta_backward."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)

    def losses(self, support: Set, query: Set) -> Tensor:
        """One call for losses and meta-gradients."""
        return metakern.meta_backward(self.model, support, query, **self.case.options)


class Vmap(Batched):
    """torch.func: grad in the inner loop, vmap over the tasks."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.params = dict(self.model.named_parameters())
        self.batched: Callable[..., Tensor] = vmap(self._task, in_dims=(None, 0, 0, 0, 0))

    def _loss(self, params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self.case.loss(functional_call(self.model, dict(params), (x,)), y)

    def _adapted(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        for _ in range(self.case.steps):
            point = {name: p.detach() for name, p in params.items()} if self.case.first_order else params
            grads = grad(self._loss)(point, x, y)
            params = {name: p - self.case.lr * grads[name] for name, p in params.items()}
        return params

    def _task(self, params: dict[str, Tensor], x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        return self._loss(self._adapted(params, x, y), query_x, query_y)

    def _prediction(self, params: dict[str, Tensor], x: Tensor, y: Tensor, query_x: Tensor) -> Tensor:
        result: Tensor = functional_call(self.model, self._adapted(params, x, y), (query_x,))
        return result

    def query_losses(self, support: Set, query: Set) -> Tensor:
        """Launch by launch, each for all tasks."""
        return self.batched(self.params, *support, *query)

    def predictions(self, support: Set, x: Tensor) -> Tensor:
        """The same loop without a query loss."""
        predict: Callable[..., Tensor] = vmap(self._prediction, in_dims=(None, 0, 0, 0))
        return predict(self.params, *support, x)


class Compiled(Vmap):
    """torch.compile of a whole meta-iteration, specialised to its sizes.

    torch.func.grad computes the backward inside: compiling only the losses and calling ``backward`` was slower.
    """

    def __init__(self, case: Case, **options: Any) -> None:
        super().__init__(case)
        self.whole = compile_peer(grad(self._mean, has_aux=True), **options)

    def _mean(self, params: dict[str, Tensor], *batch: Tensor) -> tuple[Tensor, Tensor]:
        losses = self.batched(params, *batch)
        return losses.mean(), losses

    def losses(self, support: Set, query: Set) -> Tensor:
        """Meta-iteration compiled by inductor."""
        point = {name: p.detach() for name, p in self.params.items()}
        grads, losses = self.whole(point, *support, *query)
        for name, p in self.params.items():
            p.grad = grads[name]
        result: Tensor = losses
        return result


class Looped:
    """One task after another, each with a separate backward, so that only one task's graph is held."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.model()

    def losses(self, support: Set, query: Set) -> Tensor:
        """Query losses [T], after the backward of each task's share of their mean."""
        losses = []
        for loss in self.task_losses(zip(*support, *query, strict=True)):
            (loss / self.case.tasks).backward()
            losses.append(loss.detach())
        return torch.stack(losses)

    def task_losses(self, tasks: Iterator[tuple[Tensor, ...]]) -> Iterator[Tensor]:
        """The query loss of each task in turn, with its graph."""
        raise NotImplementedError


class Loop(Looped):
    """Plain PyTorch: torch.autograd.grad and θ − α g."""

    def task_losses(self, tasks: Iterator[tuple[Tensor, ...]]) -> Iterator[Tensor]:
        """About ten lines of the user's own."""
        case = self.case
        for x, y, query_x, query_y in tasks:
            params: dict[str, Tensor] = dict(self.model.named_parameters())
            for _ in range(case.steps):
                loss = case.loss(functional_call(self.model, params, (x,)), y)
                grads = torch.autograd.grad(loss, list(params.values()), create_graph=not case.first_order)
                params = {name: p - case.lr * g for (name, p), g in zip(params.items(), grads, strict=True)}
            yield case.loss(functional_call(self.model, params, (query_x,)), query_y)


class Learner(Looped):
    """The calls of learn2learn's MAML: clone, adapt, and the clone called like the module."""

    def __init__(self, case: Case, library: Any) -> None:
        super().__init__(case)
        self.maml = library.MAML(self.model, lr=case.lr, first_order=case.first_order)

    def task_losses(self, tasks: Iterator[tuple[Tensor, ...]]) -> Iterator[Tensor]:
        """As in its examples."""
        for x, y, query_x, query_y in tasks:
            learner = self.maml.clone()
            for _ in range(self.case.steps):
                learner.adapt(self.case.loss(learner(x), y))
            yield self.case.loss(learner(query_x), query_y)


class Higher(Looped):
    """higher.innerloop_ctx around torch.optim.SGD."""

    def __init__(self, case: Case, library: ModuleType) -> None:
        super().__init__(case)
        self.context = library.innerloop_ctx
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=case.lr)

    def task_losses(self, tasks: Iterator[tuple[Tensor, ...]]) -> Iterator[Tensor]:
        """As in its examples; first order by the callback that its documentation gives."""
        options = {"grad_callback": lambda grads: [g.detach() for g in grads]} if self.case.first_order else {}
        for x, y, query_x, query_y in tasks:
            with self.context(self.model, self.optimizer, copy_initial_weights=False) as (model, optimizer):
                for _ in range(self.case.steps):
                    optimizer.step(self.case.loss(model(x), y), **options)
                yield self.case.loss(model(query_x), query_y)


class TorchOpt(Looped):
    """torchopt.MetaSGD, which steps the model in place; it has no first-order option."""

    def __init__(self, case: Case, library: ModuleType) -> None:
        super().__init__(case)
        self.library = library
        self.optimizer = library.MetaSGD(self.model, lr=case.lr)
        self.parameters = list(self.model.parameters())

    def task_losses(self, tasks: Iterator[tuple[Tensor, ...]]) -> Iterator[Tensor]:
        """As in its examples: the initial parameters are restored after every task."""
        library = self.library
        initial = [library.extract_state_dict(part, by="reference") for part in (self.model, self.optimizer)]
        for x, y, query_x, query_y in tasks:
            for _ in range(self.case.steps):
                self.optimizer.step(self.case.loss(self.model(x), y))
            loss = self.case.loss(self.model(query_x), query_y)
            for part, state in zip((self.model, self.optimizer), initial, strict=True):
                library.recover_state_dict(part, state)
            yield loss


def make_contender(name: str, case: Case, libraries: Mapping[str, ModuleType]) -> Contender | None:
    """The contender of that name; None if its library is missing or does not support the case."""
    plain: dict[str, Callable[[], Contender]] = {
        "metakern": lambda: OneCall(case),
        "metakern, autograd": lambda: Fused(case),
        "metakern, checkpoints": lambda: Fused(case, checkpoint_every=10),
        "metakern.MAML": lambda: Learner(case, metakern),
        "vmap": lambda: Vmap(case),
        "compiled": lambda: Compiled(case),
        "loop": lambda: Loop(case),
    }
    if name in plain:
        return plain[name]()
    library = libraries.get(name)
    if library is None or (name == "torchopt" and case.first_order):
        return None
    if name == "learn2learn":
        return Learner(case, library.algorithms)
    return Higher(case, library) if name == "higher" else TorchOpt(case, library)


def iterate(contender: Contender, batch: tuple[Set, Set]) -> Tensor:
    """One meta-iteration: query losses [T]; the meta-gradients are in the parameters' ``grad``."""
    contender.model.zero_grad()
    return contender.losses(*batch)


def results(contender: Contender, batch: tuple[Set, Set]) -> list[Tensor]:
    """Query losses [T] and every meta-gradient of one meta-iteration."""
    losses = iterate(contender, batch)
    grads = [p.grad.clone() for p in contender.model.parameters() if p.grad is not None]
    return [losses, *grads]


def check_agreement(contenders: Mapping[str, Contender], batches: Sequence[tuple[Set, Set]]) -> float:
    """:func:`largest_error` of the query losses and meta-gradients, over all batches, in float64.

    In float32, rounding one unit across a ReLU's kink can change correct gradients by some percent.
    """
    for contender in contenders.values():
        contender.model.double()
    try:
        return max(
            largest_error({name: results(c, doubled(batch)) for name, c in contenders.items()}, AGREEMENT)
            for batch in batches
        )
    finally:
        for contender in contenders.values():
            contender.model.float()


def doubled(batch: tuple[Set, Set]) -> tuple[Set, Set]:
    """The batch in float64."""
    (x, y), (query_x, query_y) = (
        tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in pair) for pair in batch
    )
    return (x, y), (query_x, query_y)
