"""The engine for small MLPs: adapt, meta_loss and meta_backward by the fused inner loop.

Finn et al. 2017, arXiv 1703.03400. Axis legend: T tasks, S support and Q query samples of a task, K inner steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakern.core import backend as _backend
from metakern.core.exclusive import exclusive
from metakern.core.torch_private import forward_mode_is_active, functorch
from metakern.core.transforms import is_batched, is_transformed, wants_gradient
from metakern.inner_loop.arguments import (
    Call,
    LoopOptions,
    adapted_names,
    check_step_weights,
    first_order_steps,
    sample_sets,
)
from metakern.inner_loop.as_shipped import is_plain
from metakern.inner_loop.engines.missed import warn_if_missed
from metakern.inner_loop.engines.mlp_model import (
    LOSS_FUNCTIONS,
    Mlp,
    check_data,
    find_mlp,
    known_loss,
    unserved_size,
)
from metakern.inner_loop.engines.protocol import Unserved
from metakern.inner_loop.engines.recorded import record_loss, record_mlp
from metakern.inner_loop.lineage import accumulator
from metakern.inner_loop.remembered import Remembered
from metakern.inner_loop.task_loss import TaskLoss
from metakern.ops.mlp_inner_loop import (
    make_problem,
    make_weights,
    mlp_inner_loop,
    mlp_meta_loss,
    run_meta_backward,
    run_meta_loss,
)
from metakern.ops.mlp_inner_loop.autograd import Problem

#: The operators' arguments for a call: backend, problem and step weights.
_Way = tuple[str, Problem, tuple[float, ...]]

#: Cache of the operators' arguments for meta_loss and meta_backward with default options. It saves checks that take as
#: long as a small inner loop.
served_before: Remembered[_Way] = Remembered(most=8)


class _Plan(NamedTuple):
    """How the operators serve a call.

    Attributes:
        params: the model's parameters, in the operators' order
        names: names of ``params``; empty where a layer has no bias
        adapted: names of the adapted parameters
        backend: name of the backend
        arguments: the operators' options; empty if ``way`` is given
        sets: support and query samples as the operators take them
        step_weights: weights of the query losses after every step
        key: cache key of a call with default options, else None
        way: cached arguments for ``key``, else None
    """

    params: Sequence[Tensor]
    names: list[str]
    adapted: list[str]
    backend: str
    arguments: dict[str, Any]
    sets: Sequence[tuple[Tensor, Tensor]]
    step_weights: Any = None
    key: Hashable | None = None
    way: _Way | None = None


class MlpEngine:
    """Small MLPs in one launch; see :class:`metakern.inner_loop.engines.protocol.Engine`.

    It is faster than plain PyTorch for every call that it serves; see the measurements in bench/results.
    """

    name = "fused inner loop"

    def serves(self, call: Call) -> str | None:
        """Why the operators do not take this model, loss, data or options; None if they do."""
        try:
            call.prepared[self.name] = _plan(call)
        except Unserved as unserved:
            return str(unserved)
        return None

    def adapt(self, call: Call) -> dict[str, Tensor]:
        """Adapted parameters by name, [T, *shape] each."""
        plan: _Plan = call.prepared[self.name]
        arguments: dict[str, Any] = {"backend": plan.backend, "support_mask": call.masks[0], **plan.arguments}
        results = _run(plan, lambda: mlp_inner_loop(plan.params, *plan.sets[0], **arguments))
        by_name = dict(zip(plan.names, results, strict=True))
        return {name: by_name[name] for name in plan.adapted}

    def meta_loss(self, call: Call) -> Tensor:
        """Query losses [T]."""
        plan: _Plan = call.prepared[self.name]
        losses: Tensor
        if plan.way is not None:
            losses = _run(plan, partial(run_meta_loss, *plan.way, plan.params, (), *_unmasked(plan)))
            return losses
        arguments: dict[str, Any] = {"backend": plan.backend, "step_weights": plan.step_weights, **plan.arguments}
        arguments |= {"support_mask": call.masks[0], "query_mask": call.masks[1]}
        losses = _run(plan, lambda: mlp_meta_loss(plan.params, *plan.sets, **arguments))
        _remember(call, plan)
        return losses

    def meta_backward(self, call: Call, gradient: Tensor | None) -> Tensor | None:
        """Query losses [T] of a call with default options, without autograd, which costs as much as a small loop."""
        plan: _Plan = call.prepared[self.name]
        if plan.key is None or forward_mode_is_active() or torch.is_anomaly_enabled():
            return None
        if not all(map(_accumulates, plan.params)):
            return None
        if gradient is not None and unlike_losses(gradient, plan.params[0].new_empty(len(plan.sets[0][0]))):
            return None
        support, query = _unmasked(plan)
        way = _way(call, plan)
        losses, grads = _run(plan, lambda: run_meta_backward(*way, plan.params, support, query, gradient))
        _remember(call, plan)
        _accumulate(plan.params, grads)
        return losses  # type: ignore[no-any-return]

    def described(self, call: Call) -> str:
        """One line with the number of steps and the model."""
        return f"K={call.options.steps}: fused inner loop, {type(call.options.model).__name__}"

    def missed(self, call: Call, cause: str) -> None:
        """Warn that a small MLP takes many times as long in plain PyTorch."""
        warn_if_missed(call.options, call.support[0], cause)


def unlike_losses(gradient: Tensor, losses: Tensor) -> bool:
    """Whether a gradient differs from the losses [T] in shape, dtype or device."""
    return (gradient.shape, gradient.dtype, gradient.device) != (losses.shape, losses.dtype, losses.device)


def _accumulate(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add gradients to ``grad``, safely with other threads that do the same, here or by backward()."""
    if len(sys._current_frames()) > 1:  # Python's threads; a single one starts no other in between
        with torch.enable_grad():
            nodes = [accumulator(p) for p in params]
        with torch.no_grad():  # each adds in place, under the mutex that backward() takes, too
            for node, found in zip(nodes, grads, strict=True):
                node(found)
        return
    with torch.no_grad():
        for p, found in zip(params, grads, strict=True):
            if p.grad is None:
                p.grad = found
            else:
                p.grad.add_(found)


def _accumulates(p: Tensor) -> bool:
    """Whether backward() would just add a gradient to ``grad``: no hooks, no other layout or dtype.

    A ``grad`` must have its parameter's strides, as fused optimizers walk both in memory order.
    """
    plain = p.is_leaf and p.is_contiguous() and not p._backward_hooks and not p._post_accumulate_grad_hooks
    if not plain or getattr(p, "grad_dtype", p.dtype) is not p.dtype:
        return False
    return p.grad is None or p.grad.layout is torch.strided


def _plan(call: Call) -> _Plan:
    """The plan of a call for the operators.

    Raises:
        Unserved: if they do not serve it
    """
    options = call.options
    asked = _backend.requested(options.backend)
    if options.steps == 0:  # nothing to fuse, whatever backend is asked for
        raise Unserved("steps=0 takes the model as it is")
    key = None
    if call.name != "adapt":
        usual = _usual(call, asked)
        if usual is not None:
            key, mlp = usual
            way = served_before.get(options.model, key)
            if way is not None:
                return _Plan(mlp.params, [], [], way[0], {}, (call.support, call.query), None, key, way)
    named = [_Set(*_pair("support", call.support), call.masks[0])]
    if call.name != "adapt":
        named.append(_Set(*_pair("query", call.query), call.masks[1]))
    with exclusive(options.model):
        mlp, names, arguments = _arguments(options, named)
    step_weights = _known_step_weights(call)
    sets = [_samples(each, options, mlp, arguments["loss"]) for each in named]
    if sets[0][0].shape[0] != sets[-1][0].shape[0]:
        raise Unserved("support and query do not share the task axis")
    serves = _serving(options, mlp, arguments["loss"], *(x for x, _ in sets))
    return _Plan(mlp.params, mlp.names, names, serves, arguments, sets, step_weights, key)


def _usual(call: Call, asked: str) -> tuple[Hashable, Mlp] | None:
    """Cache key and model of a call with default options and plain tensors; None for other calls."""
    options, support, query = call.options, call.support, call.query
    plain = type(options.lr) is float and type(options.first_order) is bool and bool(options.vectorize)
    plain = plain and not options.support_per_step and options.rule is None and call.step_weights is None
    if not plain or options.parameters is not None or call.is_masked or asked == "reference":
        return None
    if is_transformed() or not isinstance(options.model, nn.Module):
        return None
    if type(options.loss) is not FunctionType or options.loss not in LOSS_FUNCTIONS:
        return None
    try:
        with exclusive(options.model):
            mlp = find_mlp(options.model)
    except Unserved:
        return None
    first = mlp.params[0]
    tensors = (*support, *query) if type(support) is type(query) is tuple and len(support) == len(query) == 2 else ()
    if not tensors or mlp.flattens or torch.is_autocast_enabled(first.device.type):
        return None
    if False in [p.requires_grad for p in mlp.params] or "" in mlp.names:
        return None
    facts = [(x.shape, x.dtype, x.device) for x in tensors if type(x) is Tensor and not x.requires_grad]
    if len(facts) != 4 or True in [x.is_inference() for x in tensors]:
        return None
    of_model = (mlp.widths, mlp.activation, first.dtype, first.device)
    of_call = (
        options.loss,
        options.steps,
        options.lr,
        options.first_order,
        options.clip_norm,
        options.checkpoint_every,
        asked,
    )
    return (*of_model, *of_call, *facts), mlp


def _way(call: Call, plan: _Plan) -> _Way:
    """The operators' arguments for a call with default options."""
    if plan.way is not None:
        return plan.way
    options = call.options
    made = {name: value for name, value in plan.arguments.items() if name != "checkpoint_every"}
    problem = make_problem(plan.params, checkpoint_every=options.checkpoint_every or options.steps, **made)
    return plan.backend, problem, make_weights(None, options.steps)


def _remember(call: Call, plan: _Plan) -> None:
    """Cache the operators' arguments of a served call with default options."""
    if plan.key is not None and plan.way is None:
        served_before.put(call.options.model, plan.key, _way(call, plan))


def _unmasked(plan: _Plan) -> list[tuple[Tensor, Tensor, None]]:
    return [(x, y, None) for x, y in plan.sets]


def _run(plan: _Plan, operator: Callable[[], Any]) -> Any:
    """Call an operator.

    Raises:
        Unserved: for labels outside the outputs: plain PyTorch then raises ValueError, or ignores them
    """
    if torch.compiler.is_compiling():
        return operator()
    try:
        return operator()
    except (RuntimeError, ValueError) as error:
        if any(_names_no_output(y, plan.params[-1].shape[-1]) for _, y in plan.sets):
            raise _BeyondOutputs(str(error)) from error
        raise


def _names_no_output(labels: Tensor, outputs: int) -> bool:
    """Whether targets are class labels of which some are outside the model's outputs."""
    if labels.dtype != torch.int64 or not labels.numel():
        return False
    smallest, largest = torch.aminmax(labels)
    return bool(smallest < 0) or bool(largest >= outputs)


class _BeyondOutputs(Unserved):
    """Some class labels are outside the model's outputs; plain PyTorch knows whether the loss ignores them."""

    cause = "some labels are those that the loss ignores"


class _Set(NamedTuple):
    """Support or query sets as the caller gave them."""

    name: str
    x: Any
    y: Any
    mask: Tensor | None


def _pair(name: str, data: Any) -> tuple[str, Any, Any]:
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise Unserved(f"{name} is no pair")
    return name, data[0], data[1]


def _known_step_weights(call: Call) -> Any:
    """Weights of the query losses as numbers, or None."""
    weights = call.step_weights
    if weights is None:
        return None
    weights = check_step_weights(weights, call.options.steps)
    if isinstance(weights, Tensor):
        if torch.compiler.is_compiling() or wants_gradient(weights) or is_batched(weights):
            raise Unserved("step_weights is a tensor that requires a gradient, or whose values are not known")
        weights = weights.tolist()
    if not any(weights):
        raise Unserved("step_weights are all zero")
    return weights


def _arguments(options: LoopOptions, sets: Sequence[_Set]) -> tuple[Mlp, list[str], dict[str, Any]]:
    """The model, names of its adapted parameters, and the operator's options."""
    if _backend.requested(options.backend) == "reference":
        raise Unserved("backend='reference' asks for it")
    if not isinstance(options.model, nn.Module):
        raise Unserved("the model is no nn.Module")
    reason = _untransformed()
    if reason:
        raise Unserved(reason)
    if not options.vectorize:
        raise Unserved("vectorize=False asks for it")
    if options.support_per_step:
        raise Unserved("support_per_step brings another support set for each step")
    if not options.is_descent:
        raise Unserved(f"its steps are gradient descent, not those of {type(options.rule).__name__}")
    mlp, loss = _recognised(options, sets)
    if torch.is_autocast_enabled(mlp.params[0].device.type):
        raise Unserved("autocast is on")
    if options.parameters is None and not is_transformed() and not mlp.recorded:
        names = [name for name, p in zip(mlp.names, mlp.params, strict=True) if name and p.requires_grad]
    else:
        names = adapted_names(options.model, options.parameters)
    if not names:
        raise Unserved("the model has no parameter that requires a gradient")
    by_name = dict(zip(mlp.names, mlp.params, strict=True))
    rates = options.learning_rates({n: by_name[n] for n in names})
    adapted = [n in names for n in mlp.names]
    return (
        mlp,
        names,
        {
            "lr": mlp.rates(rates, names, options.steps),
            "steps": options.steps,
            "per_step": rates.per_step,
            "adapted": None if all(adapted) else adapted,
            "activation": mlp.activation,
            "loss": loss,
            "first_order": first_order_steps(options.first_order, options.steps),
            "clip_norm": options.largest_norm,
            "checkpoint_every": options.checkpoint_every,
        },
    )


def _recognised(options: LoopOptions, sets: Sequence[_Set]) -> tuple[Mlp, str]:
    """Recognise model and loss by class or function or, except under torch.compile, by a recording."""
    compiling = torch.compiler.is_compiling()
    try:
        mlp = find_mlp(options.model)
    except Unserved:
        if compiling:
            raise
        mlp = record_mlp(options.model, [_of_first_task(name, x) for name, x, _, _ in sets])
    loss = known_loss(options.loss)
    if loss:
        return mlp, loss
    if compiling or any(mask is not None for *_, mask in sets):  # its mean over some samples is not known
        raise Unserved("the loss is none of mse_loss, cross_entropy and binary_cross_entropy_with_logits, as they are")
    return mlp, record_loss(options.loss, mlp, [_of_first_task(name, y) for name, _, y, _ in sets])


def _of_first_task(name: str, tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dim() < 2 or not tensor.shape[0] or not tensor.shape[1]:
        raise Unserved(f"{name} is no pair of tensors with a task and a sample")
    if not is_plain(tensor):
        raise Unserved("the samples are of a subclass of Tensor")
    if tensor.is_inference():
        raise Unserved(f"{name} was made in inference mode")
    return tensor[0]


def _serving(options: LoopOptions, mlp: Mlp, loss: str, *samples: Tensor) -> str:
    """The first backend whose kernels serve the model and samples of these sizes."""
    name, device = _backend.requested(options.backend), mlp.params[0].device
    reasons = []
    for candidate in _backend.PREFERRED.get(device.type, ("cpp",)) if name == "auto" else (name,):
        missing = _backend.missing(candidate, device)
        reason = missing or unserved_size(mlp, candidate, loss, options.steps, *samples)
        if not reason:
            return candidate
        reasons.append(reason)
    raise Unserved("; ".join(reasons))


def _untransformed() -> str:
    """Why the operators do not support the torch.func transforms around the call; empty if they do."""
    if torch.compiler.is_compiling():
        inside = isinstance(functorch.peek_interpreter_stack(), functorch.CInterpreter)  # it cannot trace "is not None"
        return "torch.func transforms it within torch.compile" if inside else ""
    if forward_mode_is_active():
        return "it has no forward-mode derivative"
    kinds = [interpreter.key() for interpreter in functorch.get_interpreter_stack() or ()]
    grad, vmap = functorch.TransformType.Grad, functorch.TransformType.Vmap
    if kinds.count(grad) > 1:
        return "torch.func differentiates it twice"
    return "" if all(kind in (grad, vmap) for kind in kinds) else "it has no forward-mode derivative"


def _samples(each: _Set, options: LoopOptions, mlp: Mlp, loss: str) -> tuple[Tensor, Tensor]:
    name, x, y, mask = each
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dim() < 2 or not x.shape[0] or not x.shape[1]:
        raise Unserved(f"{name} is no pair of tensors with a task and a sample")
    if not torch.compiler.is_compiling() and (x.is_inference() or y.is_inference()):
        raise Unserved(f"{name} was made in inference mode")
    if mask is not None:  # padding may hold anything: replace it by a real sample, which is masked
        batch = sample_sets(name, (x, y), mask, TaskLoss(options.loss, True))
        x, y = batch.x, batch.y
    x = mlp.samples(x)
    check_data(mlp, loss, x, y)
    return x, y
