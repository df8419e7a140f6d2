"""MAML on all tasks of a meta-batch at once: adapt, meta_loss, meta_backward and reptile_step.

Axis legend: T tasks, S support samples and Q query samples of a task, K inner steps, ``*shape`` the shape of one
parameter tensor of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.core.checks import check_clip_norm, check_count, check_rate
from metakern.core.exclusive import exclusive
from metakern.core.trees import Data, as_data, named_tensors
from metakern.inner_loop.arguments import (
    TaskBatch,
    adapted_names,
    check_samples,
    check_step_weights,
    first_order_steps,
    task_batch,
)
from metakern.inner_loop.engines.missed import warn_if_missed
from metakern.inner_loop.engines.mlp import Options, fused_adapt, fused_meta_backward, fused_meta_loss, unlike_losses
from metakern.inner_loop.loop import InnerLoop, TaskModel, is_transformed
from metakern.inner_loop.path import attempt, is_heard, say_generic
from metakern.inner_loop.task_loss import TaskLoss
from metakern.inner_loop.vectorize import Vectorize, check_vectorize
from metakern.rules.rates import learning_rates

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

    def __call__(self, query_x: Data) -> Any:
        """Predictions of every task's model for its own ``query_x``.

        The model is in the mode, ``train()`` or ``eval()``, that it has when this is called.

        Args:
            query_x: [T, Q, ...], of the kind of ``support_x``: a tensor, or a tuple or dict of tensors

        Returns:
            what the model returns, a tensor or a tuple, dict or dataclass of them, with tensors [T, Q, ...]

        Raises:
            TypeError, ValueError: for an input of another kind, or of another T, and for an output of another kind.
        """
        check_samples("query_x", query_x, next(iter(self.parameters.values())).shape[0])
        model, x = self._model.again(), as_data(query_x)
        shared = model.at_step(model.shared, self._steps)
        return model.vectorization.run(lambda: model.predict(self.parameters, shared, x), named_tensors("query_x", x))

    def __repr__(self) -> str:
        tasks = next(iter(self.parameters.values())).shape[0]
        model = type(self._model.model).__name__
        return f"Adapted({model}, tasks={tasks}, steps={self._steps}, parameters={len(self.parameters)})"


def adapt(
    model: nn.Module,
    support_x: Data,
    support_y: Data | None = None,
    *,
    loss: Callable[..., Tensor] = F.mse_loss,
    steps: int = 1,
    lr: Rates = 0.01,
    first_order: bool | Sequence[bool] = False,
    parameters: str | Sequence[str] | None = None,
    clip_norm: float | None = None,
    support_mask: Tensor | None = None,
    checkpoint_every: int | None = None,
    vectorize: Vectorize = "auto",
    accumulate: int = 1,
    support_per_step: bool = False,
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
        support_x: [T, S, ...]; for a model of several inputs a tuple of tensors, which it is called with in this order,
            or a dict of tensors, by keyword, [T, S, ...] each
        support_y: [T, S, ...], a tensor or likewise several; None where the loss takes no target
        loss: ``loss(prediction, y)`` of one task, [S, ...] each, a number []; ``loss(prediction)`` where ``support_y``
            is None; a function or a module. ``prediction`` is what the model returns, whatever that is.
        steps: K; 0 leaves the model as it is
        lr: α: a number or a tensor of one element; or by name in a dict, or in the order of the adapted parameters in a
            list, one for every parameter tensor: a number or [], [*shape] (Meta-SGD), [K] (LSLR), or [K, *shape]. In a
            dict also by glob pattern: a parameter without an entry of its name takes that of the first pattern that
            matches, as in ``{"head.*": 0.1, "*": 0.01}``.
        first_order: FOMAML: take the inner gradients as constants; or one bool a step. For derivative-order annealing
            pass ``epoch < 50``.
        parameters: glob pattern, or list of them, of the names to adapt, ``"head.*"`` for ANIL; None adapts all that
            require a gradient. The others are shared by the tasks and receive meta-gradients. Adapted parameters that
            the loss has no use for stay as they are.
        clip_norm: largest norm of a task's gradient, over all its adapted tensors; a longer one is scaled down to it
        support_mask: bool [T, S], False at padding, for support sets of different sizes: the loss of a task is that of
            its set without padding. Evaluated at once are functions of torch.nn.functional, loss modules of torch.nn
            and a ``functools.partial`` of one, with all their options, and ``functools.partial(loss, reduction="sum")``
            of any loss. Other losses are called for one task after another, with its samples alone. Batch norm sees the
            padding, as copies of the task's first sample.
        checkpoint_every: keep the parameters of every n-th step alone and compute the steps between again in the
            backward: memory for K/n steps' parameters and n steps' graphs. Meta-gradients stay exact; they can not be
            differentiated again.
        accumulate: parts that a support set is taken in, one after another, in every inner step: their gradients add up
            to that of the whole set, and memory holds the activations of one part at a time, as the backward computes
            them again. Meta-gradients stay exact; they can not be differentiated again. Batch norm in ``train()`` mode
            sees the part alone, so that results differ there. ``loss`` must be one that ``support_mask`` names. The
            fused inner loop, whose memory is small, takes whole sets. torch.compile and the transforms of torch.func
            see all parts, and keep them.
        support_per_step: another support set for every inner step: ``support_x``, ``support_y`` and ``support_mask``
            are [T, K, S, ...]
        vectorize: evaluate all tasks at once by torch.vmap (True), or one after another (False), which suits large
            convolutions on the CPU, no faster together. ``"auto"`` does the first, and the second, with one warning,
            where torch.vmap cannot run the model: nn.LSTM, checkpointing, branches that depend on the data, backward
            hooks of modules. In torch.compile and torch.func it is True.
        backend: ``"auto"`` takes the fused inner loop where it serves: chains of ``nn.Linear`` with ReLU, leaky ReLU,
            tanh, sigmoid or GELU between, dropout in ``eval()`` mode and a flatten first, and a mean ``mse_loss``,
            ``cross_entropy`` or ``binary_cross_entropy_with_logits``, which fit the processor's cache; plain PyTorch
            otherwise, with one warning for each reason where a small MLP misses it. ``"cpp"`` raises where the fused
            one cannot; ``"reference"`` is plain PyTorch, whose meta-gradients can be differentiated again. None is
            ``"auto"``. Modules of torch.nn are recognised by their classes. Another model, or a loss of your own, is
            called once on the first task's samples, and served if it calls nothing but these layers and losses, and
            changes no attribute or variable. What else it does in Python, such as printing, it then does once for the
            call, and not in every step. torch.compile recognises classes alone. Hooks, replaced methods and modes of
            dispatch or functions lead to plain PyTorch.
        explain: print in one line which of them serves, and if plain PyTorch, why. The logger "metakern" says the same
            at level DEBUG. Compiled calls say nothing.

    Raises:
        TypeError, ValueError: for arguments that do not fit, by name; labels outside the model's outputs among them
        RuntimeError: for a loss that depends on no adapted parameter, and inside ``torch.inference_mode()``.

    Example:
        >>> adapted = adapt(net, support_x, support_y, loss=F.cross_entropy, steps=5, lr=0.4)
        >>> accuracy = (adapted(query_x).argmax(-1) == query_y).float().mean()
    """
    options = Options(
        model,
        loss,
        steps,
        lr,
        first_order,
        parameters,
        clip_norm,
        checkpoint_every,
        vectorize,
        backend,
        explain,
        accumulate,
        support_per_step,
    )
    options = _checked(options)
    fused, reason = attempt("adapt", options, lambda: fused_adapt(options, support_x, support_y, support_mask))
    loop = _inner_loop(options, support_mask is not None)
    if fused is not None:
        return Adapted(fused, loop.model, options.steps)
    support = _support(options, (support_x, support_y), support_mask, loop)
    say_generic("adapt", options, loop, support, reason)
    params = loop.model.vectorization.run(lambda: loop.run(support)[0], support.named)
    warn_if_missed(options, support_x, reason)
    return Adapted(params, loop.model, options.steps)


def meta_loss(
    model: nn.Module,
    support: tuple[Data, Data | None],
    query: tuple[Data, Data | None],
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
    vectorize: Vectorize = "auto",
    accumulate: int = 1,
    support_per_step: bool = False,
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
        support: (x, y), [T, S, ...] each, of the kinds that :func:`adapt` takes
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
        accumulate: as for :func:`adapt`
        support_per_step: as for :func:`adapt`; query sets are [T, Q, ...] as always
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
    options = Options(
        model,
        loss,
        steps,
        lr,
        first_order,
        parameters,
        clip_norm,
        checkpoint_every,
        vectorize,
        backend,
        explain,
        accumulate,
        support_per_step,
    )
    return query_losses(options, support, query, (support_mask, query_mask), step_weights)


def query_losses(
    options: Options,
    support: tuple[Data, Data | None],
    query: tuple[Data, Data | None],
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
    step_weights: Sequence[float] | Tensor | None = None,
    moves_statistics: bool = True,
) -> Tensor:
    """:func:`meta_loss`, or with the model's running statistics left as they are."""
    options = _checked(options)
    fused, reason = attempt("meta_loss", options, lambda: fused_meta_loss(options, support, query, masks, step_weights))
    if fused is not None:
        losses: Tensor = fused
        return losses
    loop = _inner_loop(options, any(mask is not None for mask in masks), step_weights)
    support_batch = _support(options, support, masks[0], loop)
    query_batch = task_batch("query", query, masks[1], loop.model.loss, support_batch.num_tasks)
    say_generic("meta_loss", options, loop, support_batch, reason)

    def evaluate() -> tuple[Tensor | None, dict[str, Tensor]]:
        params, weighted, statistics = loop.run(support_batch, None if step_weights is None else query_batch)
        if step_weights is not None:
            return weighted, statistics
        shared = loop.model.at_step({**loop.model.shared, **statistics}, options.steps)
        return loop.model.losses(params, shared, query_batch), loop.model.gathered(shared)

    weighted, statistics = loop.model.vectorization.run(evaluate, {**support_batch.named, **query_batch.named})
    if weighted is None:
        raise ValueError(f"step_weights must not all be zero, got {step_weights}")
    if moves_statistics:
        loop.model.store(statistics)
    warn_if_missed(options, support[0], reason)
    return weighted


def meta_backward(
    model: nn.Module,
    support: tuple[Data, Data | None],
    query: tuple[Data, Data | None],
    *,
    gradient: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Query losses [T] as :func:`meta_loss` gives them, and the meta-gradients of their mean added to ``grad``.

    What ``losses.mean().backward()`` does, in one call, under ``torch.no_grad()`` too, and faster for small tasks: from
    the second call of a kind on, the fused inner loop computes meta-gradients without an autograd graph. It does so for
    an ``nn.Sequential`` of layers with biases, all of whose parameters adapt and have neither hooks nor strides of
    their own, with a ``loss`` of torch.nn.functional, a number as ``lr``, and no other options than ``steps``,
    ``first_order``, ``clip_norm``, ``checkpoint_every`` and ``backend``. Other calls use autograd, with the same
    result. Only those call the hooks of gradient accumulators, which DistributedDataParallel sets. Threads may call it
    on one model, and no gradient is lost; where plain PyTorch serves, they take turns.

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
        chosen = _checked(Options(model, **options))
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
    steps, epochs, epoch = check_count("steps", steps), check_count("epochs", epochs), check_count("epoch", epoch, 0)
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


def _support(options: Options, data: Any, mask: Tensor | None, loop: InnerLoop) -> TaskBatch:
    """The support sets of a call."""
    steps = options.steps if options.support_per_step else None
    return task_batch("support", data, mask, loop.model.loss, steps=steps)


def _inner_loop(options: Options, masked: bool, step_weights: Sequence[float] | Tensor | None = None) -> InnerLoop:
    """The inner loop that the options describe, checked."""
    model, steps = options.model, options.steps
    if step_weights is not None:
        step_weights = check_step_weights(step_weights, steps)
    task_loss = TaskLoss(options.loss, masked or options.accumulate > 1)
    with exclusive(model):
        task_model = TaskModel(model, task_loss, adapted_names(model, options.parameters), options.vectorize)
    if task_model.max_steps is not None and steps > task_model.max_steps:
        raise ValueError(
            f"steps must be at most {task_model.max_steps}, for which the model has batch norm, got {steps}"
        )
    rates = learning_rates(options.lr, task_model.initial, steps)
    orders = first_order_steps(options.first_order, steps)
    return InnerLoop(
        task_model, rates, orders, options.clip_norm, step_weights, options.checkpoint_every, options.accumulate
    )


def _checked(options: Options) -> Options:
    """The options, numbers as Python has them; raises for those that do not fit."""
    if not is_transformed() and torch.is_inference_mode_enabled():
        raise RuntimeError("the inner loop takes gradients, which torch.inference_mode() forbids; use torch.no_grad()")
    every = options.checkpoint_every
    check_vectorize(options.vectorize)
    if not isinstance(options.support_per_step, bool):
        raise TypeError(f"support_per_step must be a bool, got {options.support_per_step!r}")
    return options._replace(
        steps=check_count("steps", options.steps, minimum=0),
        clip_norm=check_clip_norm(options.clip_norm),
        checkpoint_every=None if every is None else check_count("checkpoint_every", every),
        accumulate=check_count("accumulate", options.accumulate),
    )
