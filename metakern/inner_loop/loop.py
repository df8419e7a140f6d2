"""The inner loop for any model: torch.func evaluates all tasks at once, autograd differentiates through the steps.

Finn et al. 2017, arXiv 1703.03400. Axis legend: T tasks, S samples of a task, K inner steps, ``*shape`` the shape of
one parameter tensor of the model.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from metakern.core.exclusive import exclusive
from metakern.core.random_state import kept_random_state
from metakern.core.transforms import is_transformed
from metakern.core.trees import Data, check_constants, first_tensor, flatten, map_tensors
from metakern.inner_loop.arguments import TaskBatch, check_labels, split
from metakern.inner_loop.batch_norm import PerStepBatchNorm
from metakern.inner_loop.clone import call_with_tensors, captures_tensors
from metakern.inner_loop.lineage import nodes_of, recomputes
from metakern.inner_loop.recomputation import recomputed
from metakern.inner_loop.task_functions import TaskFunctions
from metakern.inner_loop.task_loss import TaskLoss
from metakern.inner_loop.vectorize import Vectorization, Vectorize
from metakern.ops.inner_update import inner_update, reference
from metakern.rules.rates import LearningRates, real_dtype

#: Parameters or buffers by name.
Tensors = dict[str, Tensor]
#: Between inner steps: parameters, the weighted sum of query losses so far, running statistics.
State = tuple[Tensors, Tensor | None, Tensors]


class TaskModel:
    """A model and a loss, evaluated for T tasks that have parameters of their own.

    Every evaluation starts from the model's buffers as they are, and what the model writes into them is discarded. The
    running statistics of PerStepBatchNorm in ``train()`` mode are the exception: an evaluation puts their means over
    the tasks into the dict ``shared`` that it is given.

    Args:
        model: any module
        loss: of one task
        names: the parameters that each task has for itself; the others are shared
        vectorize: evaluate all tasks at once, by torch.vmap, one after another, or "auto"

    Raises:
        TypeError: for a model whose parameters torch.func cannot replace
    """

    def __init__(self, model: nn.Module, loss: TaskLoss, names: Sequence[str], vectorize: Vectorize) -> None:
        _check_replaceable(model)
        self.model, self.loss, self.names = model, loss, list(names)
        self.vectorization = Vectorization(model, loss.loss, vectorize)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self.initial = {name: parameters[name] for name in names}
        self.shared: Tensors = {name: p for name, p in parameters.items() if name not in self.initial} | buffers
        self.buffers = list(buffers)
        per_step = [m for m in model.modules() if isinstance(m, PerStepBatchNorm)]
        # Batch norm writes each task's statistics into its running ones, so each task gets a copy.
        statistics = {id(b) for m in model.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False)}
        statistics |= {id(b) for m in per_step for b in (m.running_mean, m.running_var)}
        self.statistics = [name for name, buffer in buffers.items() if id(buffer) in statistics]
        self._slots = _slots(model, parameters | buffers)
        self._captures = not torch.compiler.is_compiling() and captures_tensors(model)
        names_of = {id(buffer): name for name, buffer in buffers.items()}
        self.max_steps = min([m.steps for m in per_step]) if per_step else None
        self._step_buffers = [names_of[id(m.step)] for m in per_step]
        self._gathered = {
            names_of[id(b)]: names_of[id(m.step)]
            for m in per_step
            if m.training
            for b in (m.running_mean, m.running_var)
        }

    def again(self) -> TaskModel:
        """The same for another call: the model's mode may be another, and so the way that its tasks are evaluated."""
        other = copy.copy(self)
        other.vectorization = Vectorization(self.model, self.loss.loss, self.vectorization.wanted)
        return other

    def expand(self, num_tasks: int) -> Tensors:
        """The initial parameters, [T, *shape] each, the same for every task."""
        return {name: p.unsqueeze(0).expand(num_tasks, *p.shape) for name, p in self.initial.items()}

    def at_step(self, shared: Tensors, step: int) -> Tensors:
        """A copy of ``shared`` for evaluations after so many inner steps."""
        return {**shared, **{name: torch.full_like(shared[name], step) for name in self._step_buffers}}

    def gathered(self, shared: Tensors) -> Tensors:
        """Of ``shared``, the running statistics that evaluations change."""
        return {name: shared[name].detach() for name in self._gathered}

    def store(self, statistics: Tensors) -> None:
        """Write running statistics into the model."""
        if statistics and not torch.compiler.is_compiling() and is_transformed():
            raise RuntimeError(
                "transforms of torch.func cannot move the running statistics of PerStepBatchNorm: call model.eval() or "
                "use nn.BatchNorm"
            )
        with torch.no_grad():
            for name, tensor in statistics.items():
                self.shared[name].copy_(tensor)

    def predict(self, params: Tensors, shared: Tensors, x: Data) -> Any:
        """Predictions for x [T, S, ...]: what the model returns, with tensors [T, S, ...]."""
        outputs: list[Any] = []

        def leaves(params: Tensors, shared: Tensors, x: Data) -> tuple[Tensor, ...]:
            outputs.append(self._forward(params, shared, x))
            return tuple(flatten(outputs[-1])[0])

        def evaluate(shared: Tensors) -> Any:
            return self._for_tasks(self._corrected(leaves), params, shared, (x,))

        stacked = self._recomputable(evaluate, params, shared)
        check_constants(outputs)
        return flatten(outputs[0])[1](stacked)

    def losses(self, params: Tensors, shared: Tensors, batch: TaskBatch) -> Tensor:
        """Losses [T]."""

        def evaluate(shared: Tensors) -> Tensor:
            losses: Tensor = self._for_tasks(self._task_loss(batch), params, shared, batch.tensors)
            return losses

        losses: Tensor = self._recomputable(evaluate, params, shared)
        return losses

    def gradients(self, params: Tensors, shared: Tensors, batch: TaskBatch, first_order: bool) -> list[Tensor]:
        """Gradients of the losses, [T, *shape] each, in the order of ``names``; zero where a loss has no use for one.

        Args:
            params: [T, *shape] each
            shared: the other parameters, and buffers
            batch: T tasks
            first_order: whether the gradients are constants
        """
        record = torch.is_grad_enabled() and not first_order
        # Of attention, only this implementation can be differentiated twice. It is used whether or not autograd
        # records, so that what is recomputed has the same bits.
        attention = contextlib.nullcontext() if first_order else sdpa_kernel(SDPBackend.MATH)
        if is_transformed():
            # torch.func.grad is what they transform; autograd, below, costs a quarter less.
            point = params if record else {name: p.detach() for name, p in params.items()}
            with attention:
                by_name = self._for_tasks(grad(self._task_loss(batch)), point, shared, batch.tensors)
            return [by_name[name] if record else by_name[name].detach() for name in self.names]
        with torch.enable_grad(), attention:
            point = {n: p if record and p.requires_grad else p.detach().requires_grad_() for n, p in params.items()}
            losses = self.losses(point, shared, batch)
            at = [point[name] for name in self.names]
            grads: list[Tensor | None] = [None] * len(at)
            if losses.requires_grad:
                # The tasks' losses have no parameter in common, so the gradient of their sum is that of each.
                grads = list(torch.autograd.grad(losses.sum(), at, create_graph=record, allow_unused=True))
        if all(g is None for g in grads):
            raise RuntimeError(f"loss must depend on the adapted parameters, {self.names}; it depends on none")
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, at, strict=True)]

    def _recomputable(self, evaluate: Callable[[Tensors], Any], params: Tensors, shared: Tensors) -> Any:
        """``evaluate(shared)``, whose graph may call the model again in the backward, as with torch.utils.checkpoint.

        functional_call has put the model's own parameters back by then, so a copy with the tasks' is called.

        Raises:
            RuntimeError: within torch.vmap, which is over by then, too
        """
        if self._captures or is_transformed() or not torch.is_grad_enabled():
            return evaluate(shared)
        gathered = dict(shared)
        result = evaluate(gathered)
        if recomputes(nodes_of(pytree.tree_leaves(result)), set(nodes_of(params.values()))):
            if self.vectorization.at_once:
                raise RuntimeError("torch.utils.checkpoint calls the model again in the backward, outside torch.vmap")
            self._captures = True
            return evaluate(shared)
        shared.update(gathered)
        return result

    def _forward(self, params: Tensors, shared: Tensors, x: Data) -> Any:
        """What the model returns for one task."""
        tensors = {**shared, **params}
        args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
        if self._captures:
            own = {**self.shared, **self.initial}
            return call_with_tensors(self.model, {id(own[n]): (own[n], tensors[n]) for n in own}, *args, **kwargs)
        values = {slot: tensors[name] for slot, name in self._slots.items()}
        return functional_call(self.model, values, args, kwargs, tie_weights=False)

    def _task_loss(self, batch: TaskBatch) -> Callable[..., Tensor]:
        def task_loss(params: Tensors, shared: Tensors, *tensors: Data) -> Tensor:
            x, y, mask = batch.parts(*tensors)
            prediction = self._forward(params, shared, x)
            check_labels(batch, prediction)
            return self.loss(prediction, y, mask)

        return self._corrected(task_loss)

    def _corrected(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of one task, run with the corrected forms of PyTorch functions."""
        transformed = is_transformed()

        def corrected(*arguments: Any) -> Any:
            with TaskFunctions(self.vectorization.at_once, transformed):
                return function(*arguments)

        return corrected

    def _for_tasks(self, function: Callable[..., Any], params: Tensors, shared: Tensors, data: tuple[Data, ...]) -> Any:
        """``function(params, shared, *data)`` of every task, stacked."""
        num_tasks, versions = first_tensor(data).shape[0], self._versions(params, shared)
        if not self.vectorization.at_once:
            outputs, owns = [], []
            for task in range(num_tasks):
                own = {name: shared[name].clone() for name in self.buffers}
                of_task = [map_tensors(operator.itemgetter(task), part) for part in (params, *data)]
                outputs.append(function(of_task[0], {**shared, **own}, *of_task[1:]))
                self._check_unwritten(versions, params, shared)
                owns.append({name: own[name] for name in self._gathered})
            self._gather(shared, {name: torch.stack([own[name] for own in owns]) for name in self._gathered})
            return pytree.tree_map(lambda *tensors: torch.stack(tensors), *outputs)
        own = {name: shared[name].clone() for name in self.buffers if name not in self.statistics}
        for name in self.statistics:
            own[name] = shared[name].expand(num_tasks, *shared[name].shape).clone()
        axes = {name: 0 if name in self.statistics else None for name in shared}
        batched = vmap(function, in_dims=(0, axes, *[0] * len(data)), randomness="different")
        output = batched(params, {**shared, **own}, *data)
        self._check_unwritten(versions, params, shared)
        self._gather(shared, own)
        return output

    def _versions(self, params: Tensors, shared: Tensors) -> dict[str, int]:
        """How often each parameter has been written; nothing where it is not known."""
        if is_transformed():
            return {}
        buffers = set(self.buffers)
        fixed = {name: tensor for name, tensor in shared.items() if name not in buffers}
        return {name: tensor._version for name, tensor in {**fixed, **params}.items() if not tensor.is_inference()}

    def _check_unwritten(self, versions: dict[str, int], params: Tensors, shared: Tensors) -> None:
        now = {**shared, **params}
        written = [name for name, version in versions.items() if now[name]._version != version]
        if written:
            raise RuntimeError(
                f"model must not write into its parameters, but its forward has changed {written} in place, for all "
                "tasks: compute with a new tensor there instead, or keep what is written in a buffer"
            )

    def _gather(self, shared: Tensors, own: Tensors) -> None:
        """Put the means over the tasks of their running statistics, [T, K+1, C] each, into ``shared``."""
        for name, step in self._gathered.items():
            # Means of the rows that are the same for all tasks would differ from these by rounding.
            shared[name] = PerStepBatchNorm.replaced(shared[name], own[name].detach().mean(0), shared[step])


def _check_replaceable(model: nn.Module) -> None:
    kind = type(model).__name__
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            f"model must hold the parameters that it computes with, got {kind}, which copies them to its devices: pass "
            "model.module; all tasks of a batch are evaluated together"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model must be a module in Python, got {kind}, whose parameters are fixed in TorchScript: pass the module "
            "that was scripted or traced; torch.compile takes meta_loss as a whole"
        )


def _slots(model: nn.Module, tensors: Tensors) -> dict[str, str]:
    """Every place in the model where a tensor stands, and that tensor's name: tied tensors stand in several.

    functional_call with tie_weights=True leaves a module that the model holds twice changed (pytorch issue 164759).
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    slots = {}
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            slots.update({f"{prefix}.{n}" if prefix else n: names[id(x)] for n, x in held.items() if x is not None})
    return slots


@dataclass(frozen=True)
class InnerLoop:
    """K inner steps, and the query losses that are wanted on the way.

    Attributes:
        model: what is adapted
        rates: α
        first_order: one bool for every step, whether its gradient is a constant
        clip_norm: largest norm of a task's gradient
        step_weights: a weight for the query loss after every step, or None where it is not wanted
        checkpoint_every: steps between two parameters that are kept for the backward, None to keep whole graphs
        accumulate: parts that a support set is taken in
    """

    model: TaskModel
    rates: LearningRates
    first_order: list[bool]
    clip_norm: float | None = None
    step_weights: Sequence[float] | Tensor | None = None
    checkpoint_every: int | None = None
    accumulate: int = 1
    num_steps: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", len(self.first_order))

    def run(self, support: TaskBatch, query: TaskBatch | None = None) -> State:
        """Adapt to the support sets.

        Returns:
            adapted parameters, [T, *shape] each; the weighted sum of the query losses [T], if asked for; and the
            running statistics that the evaluations lead to
        """
        # Copies, as the backward may still need what the call was given when the model's have been written.
        statistics = {name: tensor.clone() for name, tensor in self.model.gathered(self.model.shared).items()}
        shared = {name: tensor for name, tensor in self.model.shared.items() if name not in statistics}
        state: State = self.model.expand(support.num_tasks), None, statistics
        every = self.checkpoint_every
        if torch.is_grad_enabled() and self.num_steps and (every is not None or self._recomputes_parts()):
            self._check_captured(state[0], support, query)
        if every is None or not self.num_steps or not torch.is_grad_enabled():
            return self._steps(state, shared, self._arguments(), support, query, range(self.num_steps))
        for start in range(0, self.num_steps, every):
            steps = range(start, min(start + every, self.num_steps))
            arguments = (state, shared, self._arguments(), support.tensors, query and query.tensors)
            params, total, statistics = recomputed(self._segment(support, query, steps), arguments)
            # Autograd takes them for results with a gradient, along which the next segment would ask for zeros.
            state = params, total, {name: tensor.detach() for name, tensor in statistics.items()}
        return state

    def _arguments(self) -> tuple[Any, Any]:
        """What a meta-gradient may be asked for besides parameters and data."""
        return self.rates.values, self.step_weights

    def _steps(
        self,
        state: State,
        shared: Tensors,
        arguments: tuple[Any, Any],
        support: TaskBatch,
        query: TaskBatch | None,
        steps: range,
    ) -> State:
        params, total, statistics = state
        shared = self.model.at_step({**shared, **statistics}, steps.start)
        rates, weights = arguments
        names = self.model.names
        for step in steps:
            grads = self._gradients(params, shared, support.at_step(step), self.first_order[step])
            # torch.compile fuses the formula with what stands around it, and torch.func sees through it.
            plain = is_transformed() or any(params[name].is_complex() for name in names)
            update: Callable[..., list[Tensor]] = reference.inner_update if plain else inner_update
            updated = update(
                [params[name] for name in names],
                grads,
                rates,
                step=step if self.rates.per_step else None,
                clip_norm=self.clip_norm,
            )
            params = dict(zip(names, updated, strict=True))
            shared = self.model.at_step(shared, step + 1)
            if weights is not None and query is not None and (isinstance(weights, Tensor) or weights[step]):
                losses = weights[step] * self.model.losses(params, shared, query)
                total = losses if total is None else total + losses
        return params, total, self.model.gathered(shared)

    def _gradients(self, params: Tensors, shared: Tensors, support: TaskBatch, first_order: bool) -> list[Tensor]:
        """Gradients of the support losses, summed over parts of the sets; see :meth:`TaskModel.gradients`."""
        if self.accumulate == 1:
            return self.model.gradients(params, shared, support, first_order)
        recomputes = torch.is_grad_enabled() and not first_order and not is_transformed()
        total: list[Tensor] = []
        for part, shares in split(support, self.accumulate, self.model.loss):
            of_part, arguments = self._of_part(part, first_order), (params, shared, part.tensors, shares)
            grads, statistics = recomputed(of_part, arguments) if recomputes else of_part(*arguments)
            shared.update({name: tensor.detach() for name, tensor in statistics.items()})
            total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
        return total

    def _of_part(self, part: TaskBatch, first_order: bool) -> Callable[..., Any]:
        """A part's share of the gradients, and running statistics, as a function of all that they depend on."""

        def run(params: Tensors, shared: Tensors, tensors: Any, shares: Tensor) -> Any:
            with exclusive(self.model.model):  # the backward runs it again
                grads = self.model.gradients(params, shared, part.with_tensors(tensors), first_order)
            spread = [shares.view(-1, *[1] * (g.dim() - 1)).to(real_dtype(g)) for g in grads]
            return [share * g for share, g in zip(spread, grads, strict=True)], self.model.gathered(shared)

        return run

    def _recomputes_parts(self) -> bool:
        return self.accumulate > 1 and not all(self.first_order) and not is_transformed()

    def _segment(self, support: TaskBatch, query: TaskBatch | None, steps: range) -> Callable[..., Any]:
        """Some of the steps as a function of all the tensors that they depend on."""

        def run(state: Any, shared: Tensors, arguments: Any, support_tensors: Any, query_tensors: Any) -> Any:
            new_support = support.with_tensors(support_tensors)
            new_query = query and query.with_tensors(query_tensors)
            with exclusive(self.model.model):  # the backward runs it again
                return self._steps(state, shared, arguments, new_support, new_query, steps)

        return run

    def _check_captured(self, params: Tensors, support: TaskBatch, query: TaskBatch | None) -> None:
        """Raise where the loss or the model holds a tensor to which recomputation would lose the meta-gradient."""
        name = "accumulate" if self.checkpoint_every is None else "checkpoint_every"
        params, shared = pytree.tree_map_only(Tensor, torch.detach, (params, self.model.shared))
        with torch.enable_grad(), kept_random_state(support.device):
            first = support.at_step(0)
            if self.accumulate > 1:
                first = split(first, self.accumulate, self.model.loss)[0][0]
            for batch in (first, query):
                if batch is None:
                    continue
                detached = batch.with_tensors([map_tensors(Tensor.detach, part) for part in batch.tensors])
                if self.model.losses(params, shared, detached).requires_grad:
                    raise RuntimeError(
                        f"{name} recomputes from model, data and lr, but loss or model holds another tensor that "
                        f"requires a gradient, which would be lost; register it in the model, or leave {name} out"
                    )
