"""adapt, meta_loss and meta_backward by the fused inner loop, where model, loss and data are of its kind.

Finn et al. 2017, arXiv 1703.03400. Axis legend: T tasks, S support and Q query samples of a task, K inner steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from metakern.core import backend as _backend
from metakern.core.exclusive import exclusive
from metakern.core.trees import Data
from metakern.inner_loop.arguments import adapted_names, check_step_weights, first_order_steps, task_batch
from metakern.inner_loop.as_shipped import is_plain
from metakern.inner_loop.engines.mlp_model import (
    LOSS_FUNCTIONS,
    Mlp,
    Unserved,
    check_data,
    find_mlp,
    known_loss,
    unserved_size,
)
from metakern.inner_loop.engines.recorded import record_loss, record_mlp
from metakern.inner_loop.lineage import accumulator
from metakern.inner_loop.loop import is_transformed
from metakern.inner_loop.task_loss import TaskLoss
from metakern.inner_loop.vectorize import Vectorize
from metakern.ops.mlp_inner_loop import (
    make_problem,
    make_weights,
    mlp_inner_loop,
    mlp_meta_loss,
    run_meta_backward,
    run_meta_loss,
)
from metakern.ops.mlp_inner_loop.autograd import Problem, is_batched, wants_gradient
from metakern.rules.rates import learning_rates

#: Text that identifies the operator's label error. The generic path raises a ValueError, or knows labels to ignore.
LABEL_ERROR = "as the model has"


class Options(NamedTuple):
    """What adapt, meta_loss and meta_backward have in common, with its defaults; see :func:`metakern.adapt`."""

    model: nn.Module
    loss: Callable[..., Tensor] = F.mse_loss
    steps: int = 1
    lr: Any = 0.01
    first_order: bool | Sequence[bool] = False
    parameters: str | Sequence[str] | None = None
    clip_norm: float | None = None
    checkpoint_every: int | None = None
    vectorize: Vectorize = "auto"
    backend: str | None = None
    explain: bool = False
    accumulate: int = 1
    support_per_step: bool = False


def fused_adapt(options: Options, x: Data, y: Data | None, mask: Tensor | None) -> dict[str, Tensor]:
    """Adapted parameters by name, [T, *shape] each.

    Raises:
        Unserved: where the generic path must serve
    """
    with exclusive(options.model):
        mlp, names, arguments = _arguments(options, [("support", x, y, mask)])
    x, y = _samples("support", options, mlp, arguments["loss"], x, y, mask)
    serves = _serving(options, mlp, arguments["loss"], x)
    results = _served(lambda: mlp_inner_loop(mlp.params, x, y, support_mask=mask, backend=serves, **arguments))
    by_name = dict(zip(mlp.names, results, strict=True))
    return {name: by_name[name] for name in names}


def fused_meta_loss(
    options: Options,
    support: tuple[Data, Data | None],
    query: tuple[Data, Data | None],
    masks: tuple[Tensor | None, Tensor | None],
    step_weights: Sequence[float] | Tensor | None,
) -> Tensor:
    """Query losses [T].

    Raises:
        Unserved: where the generic path must serve
    """
    usual = _usual(options, support, query) if masks[0] is masks[1] is step_weights is None else None
    if usual is not None and usual.way is not None:
        known = partial(run_meta_loss, *usual.way, usual.params, (), (*support, None), (*query, None))  # type: ignore[arg-type]
        return _served(known)  # type: ignore[no-any-return]
    named = []
    for name, data, mask in (("support", support, masks[0]), ("query", query, masks[1])):
        if not isinstance(data, (tuple, list)) or len(data) != 2:
            raise Unserved(f"{name} is no pair")
        named.append((name, *data, mask))
    with exclusive(options.model):
        mlp, _, arguments = _arguments(options, named)
    if step_weights is not None:
        step_weights = check_step_weights(step_weights, options.steps)
        if isinstance(step_weights, Tensor):
            if torch.compiler.is_compiling() or wants_gradient(step_weights) or is_batched(step_weights):
                raise Unserved("step_weights is a tensor that requires a gradient, or whose values are not known")
            step_weights = step_weights.tolist()
        if not any(step_weights):
            raise Unserved("step_weights are all zero")
    sets = [_samples(name, options, mlp, arguments["loss"], x, y, mask) for name, x, y, mask in named]
    if sets[0][0].shape[0] != sets[1][0].shape[0]:
        raise Unserved("support and query do not share the task axis")
    serves = _serving(options, mlp, arguments["loss"], *(x for x, _ in sets))
    call = partial(mlp_meta_loss, support_mask=masks[0], query_mask=masks[1], step_weights=step_weights, backend=serves)
    losses: Tensor = _served(lambda: call(mlp.params, *sets, **arguments))
    if usual is not None:
        _remember(usual.key, serves, mlp, options, arguments)
    return losses


def fused_meta_backward(options: Options, support: Any, query: Any, gradient: Tensor | None) -> Tensor | None:
    """Query losses [T] of a usual call that was served before, its meta-gradients added to ``grad``; None for others.

    Without autograd: its graph takes as long as a small inner loop.
    """
    if forward_ad._current_level >= 0 or torch.is_anomaly_enabled():
        return None
    try:
        usual = _usual(options, support, query)
        if usual is None or usual.way is None or not all(map(_accumulates, usual.params)):
            return None
        way, params = usual.way, usual.params
        if gradient is not None and unlike_losses(gradient, params[0].new_empty(support[0].shape[0])):
            return None
        sets = (*support, None), (*query, None)
        losses, grads = _served(lambda: run_meta_backward(*way, params, *sets, gradient))
    except Unserved:  # for its reason meta_loss raises, or takes the generic path
        return None
    _accumulate(params, grads)
    return losses  # type: ignore[no-any-return]


def unlike_losses(gradient: Tensor, losses: Tensor) -> bool:
    """Whether the gradient cannot be that by these losses [T]."""
    return (gradient.shape, gradient.dtype, gradient.device) != (losses.shape, losses.dtype, losses.device)


def _accumulate(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add gradients to ``grad``; those that other threads add meanwhile, by this or by backward(), are not lost."""
    if len(sys._current_frames()) > 1:  # all of Python's threads; a thread that is alone can start none in between
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
    """Whether all that comes of a gradient is a sum in ``grad``, laid out as it is computed.

    A ``grad`` has its parameter's strides: fused optimizers walk both as they lie in memory.
    """
    plain = p.is_leaf and p.is_contiguous() and not p._backward_hooks and not p._post_accumulate_grad_hooks
    if not plain or getattr(p, "grad_dtype", p.dtype) is not p.dtype:
        return False
    return p.grad is None or p.grad.layout is torch.strided


class _Usual(NamedTuple):
    """Cache entry for a call with default options: its key, and how such a call was served before, if it was."""

    key: Hashable
    params: Sequence[Tensor]
    way: tuple[str, Problem, tuple[float, ...]] | None


#: Backend, problem and step weights of usual calls of meta_loss that were served, by what decided them.
_served_before: dict[Hashable, tuple[str, Problem, tuple[float, ...]]] = {}

#: So many are remembered at most.
_MOST_REMEMBERED = 256


def _usual(options: Options, support: Any, query: Any) -> _Usual | None:
    """None for a call with other options. Checking those takes as long as a small inner loop."""
    asked = _backend.requested(options.backend)
    plain = type(options.lr) is float and type(options.first_order) is bool and bool(options.vectorize)
    plain = plain and not options.support_per_step and options.steps > 0
    if not plain or options.parameters is not None or asked == "reference":
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
    key = (*of_model, *of_call, *facts)
    return _Usual(key, mlp.params, _served_before.get(key))


def _remember(key: Hashable, serves: str, mlp: Mlp, options: Options, arguments: dict[str, Any]) -> None:
    if len(_served_before) >= _MOST_REMEMBERED:
        _served_before.clear()
    made = {name: value for name, value in arguments.items() if name != "checkpoint_every"}
    problem = make_problem(mlp.params, checkpoint_every=options.checkpoint_every or options.steps, **made)
    _served_before[key] = serves, problem, make_weights(None, options.steps)


#: The name of a set, its x and y, and its mask.
_Set = tuple[str, Any, Any, Tensor | None]


def _arguments(options: Options, sets: Sequence[_Set]) -> tuple[Mlp, list[str], dict[str, Any]]:
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
    rates = learning_rates(options.lr, {n: by_name[n] for n in names}, options.steps)
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
            "clip_norm": options.clip_norm,
            "checkpoint_every": options.checkpoint_every,
        },
    )


def _recognised(options: Options, sets: Sequence[_Set]) -> tuple[Mlp, str]:
    """Model and loss by their classes and functions or, which torch.compile cannot do, by what they compute."""
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


def _serving(options: Options, mlp: Mlp, loss: str, *samples: Tensor) -> str:
    """The backend whose kernels serve the model and support and query samples of this size."""
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
    """Why the operators do not serve the transforms of torch.func around the call; empty where they do."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling():
        inside = isinstance(functorch.peek_interpreter_stack(), functorch.CInterpreter)  # None it would not trace
        return "torch.func transforms it within torch.compile" if inside else ""
    if forward_ad._current_level >= 0:
        return "it has no forward-mode derivative"
    kinds = [interpreter.key() for interpreter in functorch.get_interpreter_stack() or ()]
    grad, vmap = functorch.TransformType.Grad, functorch.TransformType.Vmap
    if kinds.count(grad) > 1:
        return "torch.func differentiates it twice"
    return "" if all(kind in (grad, vmap) for kind in kinds) else "it has no forward-mode derivative"


def _samples(
    name: str, options: Options, mlp: Mlp, loss: str, x: Any, y: Any, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.dim() < 2 or not x.shape[0] or not x.shape[1]:
        raise Unserved(f"{name} is no pair of tensors with a task and a sample")
    if not torch.compiler.is_compiling() and (x.is_inference() or y.is_inference()):
        raise Unserved(f"{name} was made in inference mode")
    if mask is not None:  # padding may hold anything: it becomes a sample that counts nothing
        batch = task_batch(name, (x, y), mask, TaskLoss(options.loss, True))
        x, y = batch.x, batch.y
    x = mlp.samples(x)
    check_data(mlp, loss, x, y)
    return x, y


def _served(call: Callable[[], Any]) -> Any:
    if torch.compiler.is_compiling():
        return call()
    try:
        return call()
    except ValueError as error:
        if LABEL_ERROR in str(error):
            raise Unserved(str(error)) from error
        raise
