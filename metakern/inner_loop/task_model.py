"""Evaluation of any model and loss for T tasks with their own parameters: losses, gradients, predictions.

torch.func evaluates all tasks at once. Axis legend: T tasks, S samples of a task, K inner steps, ``*shape`` the shape
of one parameter tensor of the model.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from metakern.core.exclusive import exclusive
from metakern.core.random_state import kept_random_state
from metakern.core.torch_private import NormBase, pytree
from metakern.core.transforms import is_transformed
from metakern.core.trees import Data, check_constants, first_tensor, flatten, map_tensors
from metakern.inner_loop.arguments import SampleSets, check_labels, split
from metakern.inner_loop.batch_norm import PerStepBatchNorm
from metakern.inner_loop.clone import call_with_tensors, captures_tensors
from metakern.inner_loop.lineage import nodes_of, recomputes
from metakern.inner_loop.loop import Problem, losses_and_gradients
from metakern.inner_loop.pending import tensor_of, tensors_of
from metakern.inner_loop.recomputation import recomputed
from metakern.inner_loop.task_functions import TaskFunctions
from metakern.inner_loop.task_layers import TaskLayers
from metakern.inner_loop.task_loss import TaskLoss
from metakern.inner_loop.vectorize import Vectorization, Vectorize
from metakern.rules.protocol import detached
from metakern.rules.rates import real_dtype

#: Parameters or buffers by name.
Tensors = dict[str, Tensor]


class TaskModel:
    """A model and a loss, evaluated for T tasks that have parameters of their own.

    Every evaluation starts from the model's current buffers and discards what the model writes into them. The
    exception: for the running statistics of PerStepBatchNorm in ``train()`` mode, an evaluation stores their means over
    the tasks in its argument ``shared``.

    Args:
        model: any module
        loss: loss of one task
        names: the per-task parameters; the tasks share the others
        vectorize: whether to evaluate all tasks at once by torch.vmap, or "auto"
        backend: of the kernels for layers under torch.vmap

    Attributes:
        layers: these kernels

    Raises:
        TypeError: for a model whose parameters torch.func cannot replace
    """

    def __init__(
        self,
        model: nn.Module,
        loss: TaskLoss,
        names: Sequence[str],
        vectorize: Vectorize,
        backend: str | None = None,
    ) -> None:
        _check_replaceable(model)
        self.model, self.loss, self.names = model, loss, list(names)
        self.vectorization = Vectorization(model, loss.loss, vectorize)
        parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        self.initial = {name: parameters[name] for name in names}
        self.layers = TaskLayers(next(iter(parameters.values())).device, backend)
        self.shared: Tensors = {name: p for name, p in parameters.items() if name not in self.initial} | buffers
        self.buffers = list(buffers)
        per_step = [m for m in model.modules() if isinstance(m, PerStepBatchNorm)]
        # Batch norm writes each task's statistics into its running ones, so each task gets a copy.
        statistics = {id(b) for m in model.modules() if isinstance(m, NormBase) for b in m.buffers(recurse=False)}
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
        """A copy for another call, which decides anew on vectorization, as the model's mode may have changed."""
        other = copy.copy(self)
        other.vectorization = Vectorization(self.model, self.loss.loss, self.vectorization.wanted)
        return other

    def expand(self, num_tasks: int, start: Mapping[str, Tensor] | None = None) -> Tensors:
        """Initial parameters, [T, *shape] each, the same for every task: from ``start``, else the model's."""
        initial = self.initial if start is None else {**self.initial, **start}
        return {name: p.unsqueeze(0).expand(num_tasks, *p.shape) for name, p in initial.items()}

    def at_step(self, shared: Tensors, step: int) -> Tensors:
        """A copy of ``shared`` for evaluations after ``step`` inner steps."""
        return {**shared, **{name: torch.full_like(shared[name], step) for name in self._step_buffers}}

    def gathered(self, shared: Tensors) -> Tensors:
        """The running statistics in ``shared`` that evaluations change."""
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
        """Predictions for x [T, S, ...]: the model's outputs, with tensors [T, S, ...]."""
        outputs: list[Any] = []

        def leaves(params: Tensors, shared: Tensors, x: Data) -> tuple[Tensor, ...]:
            outputs.append(self._forward(params, shared, x))
            return tuple(map(tensor_of, flatten(outputs[-1])[0]))

        def evaluate(shared: Tensors) -> Any:
            return self._for_tasks(self._corrected(leaves), params, shared, (x,))

        stacked = self._recomputable(evaluate, params, shared)
        check_constants(outputs)
        return flatten(outputs[0])[1](stacked)

    def losses(self, params: Tensors, shared: Tensors, batch: SampleSets) -> Tensor:
        """Losses [T]."""

        def evaluate(shared: Tensors) -> Tensor:
            losses: Tensor = self._for_tasks(self._task_loss(batch), params, shared, batch.tensors)
            return losses

        losses: Tensor = self._recomputable(evaluate, params, shared)
        return losses

    def gradients(
        self, params: Tensors, shared: Tensors, batch: SampleSets, first_order: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses [T] and their gradients, [T, *shape] each; zeros for parameters without effect.

        Args:
            params: [T, *shape] each
            shared: the shared parameters, and buffers
            batch: T tasks
            first_order: whether losses and gradients are constants
        """
        # Only this attention implementation can be differentiated twice. It is used whether or not autograd records,
        # so that recomputation gives the same bits.
        attention = contextlib.nullcontext() if first_order else sdpa_kernel(SDPBackend.MATH)
        if is_transformed():
            # Transforms need torch.func.grad; autograd, below, costs a quarter less.
            record = torch.is_grad_enabled() and not first_order
            point = params if record else {name: p.detach() for name, p in params.items()}
            with attention:
                found = self._for_tasks(grad_and_value(self._task_loss(batch)), point, shared, batch.tensors)
            by_name, losses = found if record else pytree.tree_map(torch.detach, found)
            return losses, {name: by_name[name] for name in self.names}

        def losses_of(at: list[Tensor]) -> Tensor:
            return self.losses(dict(zip(self.names, at, strict=True)), shared, batch)

        at, names = [params[name] for name in self.names], f"adapted parameters, {self.names}"
        with attention:
            losses, grads = losses_and_gradients(losses_of, at, first_order, names)
        return losses, dict(zip(self.names, grads, strict=True))

    def _recomputable(self, evaluate: Callable[[Tensors], Any], params: Tensors, shared: Tensors) -> Any:
        """``evaluate(shared)``, for models that the backward may call again, as torch.utils.checkpoint does.

        By then functional_call has restored the model's own parameters, so such models are evaluated as copies that
        keep the task's parameters.

        Raises:
            RuntimeError: for such a model under torch.vmap, which has ended by then, too
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
        """The model's output for one task."""
        tensors = {**shared, **params}
        args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
        if self._captures:
            own = {**self.shared, **self.initial}
            replaced = {id(own[n]): (own[n], tensors[n]) for n in own}
            return tensors_of(call_with_tensors(self.model, replaced, *args, **kwargs))
        values = {slot: tensors[name] for slot, name in self._slots.items()}
        return tensors_of(functional_call(self.model, values, args, kwargs, tie_weights=False))

    def _task_loss(self, batch: SampleSets) -> Callable[..., Tensor]:
        def task_loss(params: Tensors, shared: Tensors, *tensors: Data) -> Tensor:
            x, y, mask = batch.parts(*tensors)
            prediction = self._forward(params, shared, x)
            check_labels(batch, prediction)
            return self.loss(prediction, y, mask)

        return self._corrected(task_loss)

    def _corrected(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function (params, shared, ...) of one task, wrapped to use the corrected forms of PyTorch functions."""
        transformed, at_once = is_transformed(), self.vectorization.at_once

        def corrected(params: Tensors, shared: Tensors, *rest: Any) -> Any:
            named = at_once and not torch.compiler.is_compiling()
            names = {id(tensor): name for part in (shared, params) for name, tensor in part.items()} if named else {}
            auto = self.vectorization.wanted == "auto"
            with TaskFunctions(at_once, transformed, self.layers, names, auto):
                return function(params, shared, *rest)

        return corrected

    def _for_tasks(self, function: Callable[..., Any], params: Tensors, shared: Tensors, data: tuple[Data, ...]) -> Any:
        """``function(params, shared, *data)`` for every task, with the results stacked."""
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
        """Version counters of the parameters, where known: in-place writes increase them."""
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
        """Store the means over tasks of the running statistics, [T, K+1, C] each, in ``shared``."""
        for name, step in self._gathered.items():
            # Only the current row: the others are equal for all tasks, and a mean would change them by rounding.
            shared[name] = PerStepBatchNorm.replaced(shared[name], own[name].detach().mean(0), shared[step])


class TaskProblem(Problem):
    """Support sets of T tasks for a :class:`TaskModel`, and optional query losses after every step.

    Args:
        model: the model to adapt
        support: support sets of the inner steps
        query: query sets for the losses after every step; None for no such losses
        step_weights: weights of the query losses after every step, [K]
        accumulate: number of parts into which each support set is split

    Attributes:
        total: the weighted sum of the query losses so far, [T]; None before the first
    """

    def __init__(
        self,
        model: TaskModel,
        support: SampleSets,
        query: SampleSets | None = None,
        step_weights: Sequence[float] | Tensor | None = None,
        accumulate: int = 1,
    ) -> None:
        self.model, self.support, self.query = model, support, query
        self.step_weights, self.accumulate = step_weights, accumulate
        self.total: Tensor | None = None
        # Copies: the call writes the model's statistics, and the backward may still need the old values.
        statistics = {name: tensor.clone() for name, tensor in model.gathered(model.shared).items()}
        self.shared = model.at_step({**model.shared, **statistics}, 0)

    @property
    def statistics(self) -> Tensors:
        """The running statistics after the evaluations so far."""
        return self.model.gathered(self.shared)

    @property
    def recomputes_parts(self) -> bool:
        """Whether the backward recomputes parts of the sets, unless gradients are constants."""
        return self.accumulate > 1 and not is_transformed()

    def gradients(self, params: Any, step: int, first_order: bool) -> tuple[Tensor, Any]:
        """Losses and gradients on the support sets of a step, summed over their parts."""
        support = self.support.at_step(step)
        if self.accumulate == 1:
            return self.model.gradients(params, self.shared, support, first_order)
        recomputes = torch.is_grad_enabled() and not first_order and self.recomputes_parts
        total: Any = None
        for part, shares in split(support, self.accumulate, self.model.loss):
            of_part, arguments = self._of_part(part, first_order), (params, self.shared, part.tensors, shares)
            found, statistics = recomputed(of_part, arguments) if recomputes else of_part(*arguments)
            self.shared.update({name: tensor.detach() for name, tensor in statistics.items()})
            total = found if total is None else pytree.tree_map(torch.add, total, found)
        losses, grads = total
        return losses, grads

    def stepped(self, params: Any, step: int) -> None:
        """Add the weighted query losses after the step."""
        self.shared = self.model.at_step(self.shared, step + 1)
        weights = self.step_weights
        if weights is not None and self.query is not None and (isinstance(weights, Tensor) or weights[step]):
            losses = weights[step] * self.model.losses(params, self.shared, self.query)
            self.total = losses if self.total is None else self.total + losses

    def tensors(self) -> tuple[Any, Any]:
        """Changing: query losses so far and running statistics. Fixed: shared parameters, sets and weights."""
        statistics = self.statistics
        shared = {name: tensor for name, tensor in self.shared.items() if name not in statistics}
        query = None if self.query is None else self.query.tensors
        return (self.total, statistics), (shared, self.support.tensors, query, self.step_weights)

    def with_tensors(self, changing: Any, fixed: Any, step: int) -> TaskProblem:
        """The same sets with other tensors."""
        other = copy.copy(self)
        other.total, statistics = changing
        shared, support, query, other.step_weights = fixed
        # Detached: autograd would take them for differentiable results, and the next segment would pass zeros back.
        statistics = {name: tensor.detach() for name, tensor in statistics.items()}
        other.shared = self.model.at_step({**shared, **statistics}, step)
        other.support = self.support.with_tensors(support)
        other.query = None if self.query is None else self.query.with_tensors(query)
        return other

    def lock(self) -> AbstractContextManager[Any]:
        """The model's lock, as evaluations replace its tensors temporarily."""
        return exclusive(self.model.model)

    def check_captured(self, name: str, params: Tensors) -> None:
        """Raise if recomputation, asked for by option ``name``, would lose the gradient of a captured tensor."""
        params, shared = detached((params, self.model.shared))
        with torch.enable_grad(), kept_random_state(self.support.device):
            first = self.support.at_step(0)
            if self.accumulate > 1:
                first = split(first, self.accumulate, self.model.loss)[0][0]
            for batch in (first, self.query):
                if batch is None:
                    continue
                constant = batch.with_tensors([map_tensors(Tensor.detach, part) for part in batch.tensors])
                if self.model.losses(params, shared, constant).requires_grad:
                    raise RuntimeError(
                        f"{name} recomputes from model, data and lr, but loss or model holds another tensor that "
                        f"requires a gradient, which would be lost; register it in the model, or leave {name} out"
                    )

    def _of_part(self, part: SampleSets, first_order: bool) -> Callable[..., Any]:
        """A pure function that gives a part's share of losses and gradients, and the running statistics."""

        def run(params: Tensors, shared: Tensors, tensors: Any, shares: Tensor) -> Any:
            def share(x: Tensor) -> Tensor:
                return shares.view(-1, *[1] * (x.dim() - 1)).to(real_dtype(x)) * x

            with exclusive(self.model.model):  # the backward runs it again
                found = self.model.gradients(params, shared, part.with_tensors(tensors), first_order)
            return pytree.tree_map(share, found), self.model.gathered(shared)

        return run


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
    """Every slot of the model that holds a tensor, and the tensor's name; tied tensors have several slots.

    functional_call with tie_weights=True leaves a module that the model holds twice changed (pytorch issue 164759).
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    slots = {}
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            slots.update({f"{prefix}.{n}" if prefix else n: names[id(x)] for n, x in held.items() if x is not None})
    return slots
