"""The MAML family: one learner for one task, as users of learn2learn write it, and all tasks of a meta-batch at once.

- MAML, FOMAML: Finn et al. 2017, arXiv 1703.03400
- Meta-SGD, a learned learning rate a parameter: Li et al. 2017, arXiv 1707.09835
- Reptile: Nichol et al. 2018, arXiv 1803.02999
- MAML++, learned learning rates a tensor and step (LSLR), multi-step loss (MSL), derivative-order annealing,
  per-step batch-norm statistics (:func:`per_step_batch_norm`): Antoniou et al. 2018, arXiv 1810.09502
- ANIL, only the head adapts: Raghu et al. 2019, arXiv 1909.09157

Axis legend: T tasks, S support samples and Q query samples of a task, K inner steps, ``*shape`` the shape of one
parameter tensor of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern._batch_norm import PerStepBatchNorm as PerStepBatchNorm
from metakern._batch_norm import per_step_batch_norm as per_step_batch_norm
from metakern._fused_inner_loop import Options, fused_adapt, fused_meta_backward, fused_meta_loss, unlike_losses
from metakern._inner_loop import InnerLoop, TaskModel, is_transformed
from metakern._inner_loop_input import (
    adapted_names,
    check_clip_norm,
    check_samples,
    check_step_weights,
    first_order_steps,
    task_batch,
)
from metakern._learner import MAML as MAML
from metakern._learner import MetaSGD as MetaSGD
from metakern._path import attempt, is_heard, say_generic
from metakern._rates import check_count, check_rate, learning_rates
from metakern._task_loss import TaskLoss

#: Learning rates of the batched calls.
Rates = float | Tensor | Mapping[str, float | Tensor] | Sequence[float | Tensor] | nn.ParameterList | nn.ParameterDict

#: Options that :func:`adapt` and :func:`meta_loss` have in common: others of meta_loss go by autograd.
_OF_ADAPT = frozenset(Options._fields) - {"model"}


class Adapted:
    """The models of T tasks after their inner steps; made by :func:`adapt`.

    Attributes:
        parameters: the adapted parameters by name, [T, *shape] each; meta-gradients flow through them to the model's
    """

    def __init__(self, parameters: dict[str, Tensor], model: TaskModel, steps: int) -> None:
        self.parameters = parameters
        self._model, self._steps = model, steps

    def __call__(self, query_x: Tensor) -> Tensor:
        """Predictions [T, Q, ...] of every task's model for its own ``query_x`` [T, Q, ...].

        The model is in the mode, ``train()`` or ``eval()``, that it has when this is called.

        Raises:
            TypeError, ValueError: for an input of another kind, or of another T.
        """
        check_samples("query_x", query_x, next(iter(self.parameters.values())).shape[0])
        return self._model.predict(self.parameters, self._model.at_step(self._model.shared, self._steps), query_x)


def adapt(
    model: nn.Module,
    support_x: Tensor,
    support_y: Tensor,
    *,
    loss: Callable[..., Tensor] = F.mse_loss,
    steps: int = 1,
    lr: Rates = 0.01,
    first_order: bool | Sequence[bool] = False,
    parameters: str | Sequence[str] | None = None,
    clip_norm: float | None = None,
    support_mask: Tensor | None = None,
    checkpoint_every: int | None = None,
    vectorize: bool = True,
    backend: str | None = None,
    explain: bool = False,
) -> Adapted:
    """K gradient steps on the support sets of T tasks at once, each from the model's parameters (MAML's inner loop).

    Finn et al. 2017, arXiv 1703.03400. Meta-gradients, exact to second order, flow from the result to the model's
    parameters, to ``lr`` and to ``support_x``; under ``torch.no_grad()`` none are recorded. ``model`` is not changed.

    Args:
        model: any module that takes [S, ...] and whose parameters are the initialisation of every task. Each evaluation
            starts from its buffers, and what it writes into them is discarded: in ``train()`` mode batch norm uses the
            statistics of the task's current batch, support or query, and running statistics stay as they are; in
            ``eval()`` mode it uses the running ones. See :func:`per_step_batch_norm` for running statistics of every
            step. Dropout draws for each task and step.
        support_x: [T, S, ...]
        support_y: [T, S, ...]
        loss: ``loss(prediction, y)`` of one task, [S, ...] each, a number []; a function or a module
        steps: K
        lr: α: a number or a tensor of one element; or by name in a dict, or in the order of the adapted parameters in a
            list, one for every parameter tensor: a number or [], [*shape] (Meta-SGD), [K] (LSLR), or [K, *shape]
        first_order: FOMAML: take the inner gradients as constants; or one bool a step. For derivative-order annealing
            pass ``epoch < 50``.
        parameters: glob pattern, or list of them, of the names to adapt, ``"head.*"`` for ANIL; None adapts all that
            require a gradient. The others are shared by the tasks and receive meta-gradients. Adapted parameters that
            the loss has no use for stay as they are.
        clip_norm: largest norm of a task's gradient, over all its adapted tensors; a longer one is scaled down to it
        support_mask: bool [T, S], False at padding, for support sets of different sizes: the loss of a task is that of
            its set without padding. ``loss`` must then be a function of torch.nn.functional, a loss module of torch.nn
            or a ``functools.partial`` of one, with any of their options; any other loss must be a sum (``reduction=
            "sum"`` by ``functools.partial``) or asks for ``vectorize=False``. Batch norm sees the padding, as copies of
            the task's first sample.
        checkpoint_every: keep the parameters of every n-th step alone and compute the steps between again in the
            backward: memory for K/n steps' parameters and n steps' graphs. Meta-gradients stay exact; they can not be
            differentiated again.
        vectorize: evaluate all tasks at once by torch.vmap; False takes one after another, for models that vmap
            refuses, and for large convolutions on the CPU, which are no faster together
        backend: ``"auto"`` takes the fused inner loop where it serves: chains of ``nn.Linear`` with ReLU, tanh, sigmoid
            or GELU between and a mean ``mse_loss``, ``cross_entropy`` or ``binary_cross_entropy_with_logits``, which
            fit the processor's cache; plain PyTorch otherwise. ``"cpp"`` raises where the fused one cannot;
            ``"reference"`` is plain PyTorch, whose meta-gradients can be differentiated again. None is ``"auto"``.
        explain: print in one line which of them serves, and if plain PyTorch, why. The logger "metakern" says the same
            at level DEBUG. Compiled calls say nothing.

    Raises:
        TypeError, ValueError: for arguments that do not fit, by name; labels outside the model's outputs among them
        RuntimeError: for a loss that depends on no adapted parameter, and inside ``torch.inference_mode()``.

    Example:
        >>> adapted = adapt(net, support_x, support_y, loss=F.cross_entropy, steps=5, lr=0.4)
        >>> accuracy = (adapted(query_x).argmax(-1) == query_y).float().mean()
    """
    masked = support_mask is not None
    _check_options(steps, clip_norm, checkpoint_every, vectorize)
    options = Options(
        model, loss, steps, lr, first_order, parameters, clip_norm, checkpoint_every, vectorize, backend, explain
    )
    fused, reason = attempt("adapt", options, lambda: fused_adapt(options, support_x, support_y, support_mask))
    loop, task_loss = _inner_loop(options, masked)
    if fused is not None:
        return Adapted(fused, loop.model, steps)
    support = task_batch("support", (support_x, support_y), support_mask, task_loss)
    say_generic("adapt", options, loop, support, reason)
    return Adapted(loop.run(support)[0], loop.model, steps)


def meta_loss(
    model: nn.Module,
    support: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
    *,
    loss: Callable[..., Tensor] = F.mse_loss,
    steps: int = 1,
    lr: Rates = 0.01,
    first_order: bool | Sequence[bool] = False,
    parameters: str | Sequence[str] | None = None,
    clip_norm: float | None = None,
    support_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    step_weights: Sequence[float] | Tensor | None = None,
    checkpoint_every: int | None = None,
    vectorize: bool = True,
    backend: str | None = None,
    explain: bool = False,
) -> Tensor:
    """Query losses [T] of T tasks after K inner steps on their support sets: MAML's meta-objective before the mean.

    ``meta_loss(...).mean().backward()`` leaves exact meta-gradients in ``model.parameters()``, and in ``lr`` where it
    holds tensors that require them. Works in ``torch.compile(fullgraph=True)`` and the transforms of torch.func, but
    there without ``vectorize=False``, and ``checkpoint_every`` alone where the fused inner loop serves; plain PyTorch
    serves derivatives of derivatives, forward mode, and torch.func within torch.compile. Compiled, it does not look for
    labels out of range.

    Args:
        model: as for :func:`adapt`, but in ``train()`` mode, under ``torch.no_grad()`` too, the running statistics of
            :class:`PerStepBatchNorm` move
        support: (x, y), [T, S, ...] each
        query: (x, y), [T, Q, ...] each
        loss: as for :func:`adapt`, of support and query sets
        steps: K
        lr: as for :func:`adapt`
        first_order: as for :func:`adapt`
        parameters: as for :func:`adapt`
        clip_norm: as for :func:`adapt`
        support_mask: as for :func:`adapt`
        query_mask: bool [T, Q], the same for query sets
        step_weights: [K], MAML++'s multi-step loss: Σ_k w_k L_query(θ_k) over the parameters after every step, in place
            of L_query(θ_K); see :func:`multi_step_weights`
        checkpoint_every: as for :func:`adapt`
        vectorize: as for :func:`adapt`
        backend: as for :func:`adapt`
        explain: as for :func:`adapt`

    Returns:
        losses [T]

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`adapt`; RuntimeError also for running statistics that would move
            within a transform of torch.func.

    Example:
        >>> optimizer.zero_grad()
        >>> meta_loss(net, (support_x, support_y), (query_x, query_y), steps=5, lr=0.01).mean().backward()
        >>> optimizer.step()
    """
    masked = support_mask is not None or query_mask is not None
    _check_options(steps, clip_norm, checkpoint_every, vectorize)
    options = Options(
        model, loss, steps, lr, first_order, parameters, clip_norm, checkpoint_every, vectorize, backend, explain
    )
    masks = support_mask, query_mask
    fused, reason = attempt("meta_loss", options, lambda: fused_meta_loss(options, support, query, masks, step_weights))
    if fused is not None:
        losses: Tensor = fused
        return losses
    loop, task_loss = _inner_loop(options, masked, step_weights)
    support_batch = task_batch("support", support, support_mask, task_loss)
    query_batch = task_batch("query", query, query_mask, task_loss, support_batch.x.shape[0])
    say_generic("meta_loss", options, loop, support_batch, reason)
    params, weighted, statistics = loop.run(support_batch, None if step_weights is None else query_batch)
    if step_weights is None:
        shared = loop.model.at_step({**loop.model.shared, **statistics}, steps)
        weighted = loop.model.losses(params, shared, query_batch)
        statistics = loop.model.gathered(shared)
    if weighted is None:
        raise ValueError(f"step_weights must not all be zero, got {step_weights}")
    loop.model.store(statistics)
    return weighted


def meta_backward(
    model: nn.Module,
    support: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
    *,
    gradient: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Query losses [T] as :func:`meta_loss` gives them, and the meta-gradients of their mean added to ``grad``.

    What ``losses.mean().backward()`` does, in one call, under ``torch.no_grad()`` too, and sooner for small tasks:
    where the fused inner loop serves, from the second call of a kind on, its meta-gradients come without a graph. So
    they do for an ``nn.Sequential`` of layers with biases, all of whose parameters adapt and have neither hooks nor
    strides of their own; a ``loss`` that is a function; an ``lr`` that is a number; and of the options ``steps``,
    ``first_order``, ``checkpoint_every`` and ``backend`` alone. Other calls go by autograd, with the same result. Hooks
    of gradient accumulators, which DistributedDataParallel sets, are called then alone.

    Args:
        model: as for :func:`meta_loss`
        support: (x, y), [T, S, ...] each
        query: (x, y), [T, Q, ...] each
        gradient: of what is minimised by the losses, [T], where that is not their mean: 1/N everywhere for one of
            several parts of a meta-batch of N tasks
        options: those of :func:`meta_loss`

    Returns:
        losses [T], detached

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`meta_loss`; also for a ``gradient`` that is no tensor like the
            losses, and within torch.compile and the transforms of torch.func.

    Example:
        >>> optimizer.zero_grad()
        >>> losses = meta_backward(net, (support_x, support_y), (query_x, query_y), steps=5, lr=0.01)
        >>> optimizer.step()
    """
    if is_transformed():
        raise RuntimeError("meta_backward fills grad, which torch.compile and torch.func do not see; call meta_loss")
    if gradient is not None and not isinstance(gradient, Tensor):
        raise TypeError(f"gradient must be a tensor [T], got {type(gradient).__name__}")
    losses = None
    if options.keys() <= _OF_ADAPT:
        chosen = Options(model, **options)
        _check_options(chosen.steps, chosen.clip_norm, chosen.checkpoint_every, chosen.vectorize)
        losses = None if is_heard(chosen) else fused_meta_backward(chosen, support, query, gradient)
    if losses is None:
        with torch.enable_grad():
            losses = meta_loss(model, support, query, **options)
            gradient = torch.full_like(losses, 1 / len(losses)) if gradient is None else gradient
            if unlike_losses(gradient, losses):
                got = f"{gradient.dtype} {list(gradient.shape)} on {gradient.device}"
                raise ValueError(f"gradient must be {losses.dtype} [{len(losses)}] on {losses.device}, got {got}")
            losses.backward(gradient)
    return losses.detach()


def multi_step_weights(steps: int, epoch: int, epochs: int) -> Tensor:
    """MAML++'s annealed weights [K] of the query losses after every inner step; they sum to 1.

    Antoniou et al. 2018, arXiv 1810.09502: max(1/K − e/(K·E), 0.03/K) for all but the last step, the last takes the
    rest.

    Args:
        steps: K
        epoch: e, from 0
        epochs: E, the epochs over which the weight moves to the last step

    Raises:
        TypeError, ValueError: unless K and E are at least 1 and e is not negative.
    """
    check_count("steps", steps)
    check_count("epochs", epochs)
    check_count("epoch", epoch, minimum=0)
    weights = torch.full((steps,), max(1 / steps - epoch / (steps * epochs), 0.03 / steps))
    weights[-1] = 1 - weights[:-1].sum()
    return weights


@torch.no_grad()
def reptile_step(model: nn.Module, adapted: Adapted, epsilon: float) -> None:
    """Reptile's outer step, in place: θ += ε (mean over tasks of φ − θ), for the adapted parameters.

    Nichol et al. 2018, arXiv 1803.02999.

    Args:
        model: the module that was adapted
        adapted: φ, from :func:`adapt`, best under ``torch.no_grad()``
        epsilon: ε, 0 to 1

    Raises:
        TypeError, ValueError: for an ``epsilon`` that is no finite number, and parameters that the model does not have.
    """
    check_rate("epsilon", epsilon)
    parameters = dict(model.named_parameters())
    for name, phi in adapted.parameters.items():
        if name not in parameters or parameters[name].shape != phi.shape[1:]:
            raise ValueError(f"model must be the one that was adapted: it has no {name} of shape {list(phi.shape[1:])}")
    for name, phi in adapted.parameters.items():
        parameters[name].add_(epsilon * (phi.mean(0) - parameters[name]))


def _inner_loop(
    options: Options, masked: bool, step_weights: Sequence[float] | Tensor | None = None
) -> tuple[InnerLoop, TaskLoss]:
    """The inner loop that the options describe, checked."""
    model, steps = options.model, options.steps
    if step_weights is not None:
        step_weights = check_step_weights(step_weights, steps)
    task_loss = TaskLoss(options.loss, masked)
    task_model = TaskModel(model, task_loss, adapted_names(model, options.parameters), options.vectorize)
    if task_model.max_steps is not None and steps > task_model.max_steps:
        raise ValueError(
            f"steps must be at most {task_model.max_steps}, for which the model has batch norm, got {steps}"
        )
    rates = learning_rates(options.lr, task_model.initial, steps)
    orders = first_order_steps(options.first_order, steps)
    return InnerLoop(task_model, rates, orders, options.clip_norm, step_weights, options.checkpoint_every), task_loss


def _check_options(steps: int, clip_norm: float | None, checkpoint_every: int | None, vectorize: bool) -> None:
    if not is_transformed() and torch.is_inference_mode_enabled():
        raise RuntimeError("the inner loop takes gradients, which torch.inference_mode() forbids; use torch.no_grad()")
    check_count("steps", steps)
    check_clip_norm(clip_norm)
    if not isinstance(vectorize, bool):
        raise TypeError(f"vectorize must be a bool, got {vectorize!r}")
    if checkpoint_every is not None:
        check_count("checkpoint_every", checkpoint_every)
