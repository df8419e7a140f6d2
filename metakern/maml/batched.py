"""MAML on all tasks of a meta-batch at once: adapt, meta_loss, meta_backward and reptile_step.

Axis legend: T tasks, S support samples and Q query samples of a task, K inner steps, ``*shape`` the shape of one
parameter tensor of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.core.checks import check_count, check_rate
from metakern.core.transforms import is_transformed
from metakern.core.trees import Data, as_data, map_tensors, named_tensors
from metakern.inner_loop.arguments import (
    DEFAULT_LR,
    Call,
    LoopOptions,
    check_samples,
)
from metakern.inner_loop.engines import Engine
from metakern.inner_loop.engines.generic import task_model
from metakern.inner_loop.engines.mlp import unlike_losses
from metakern.inner_loop.failures import Instead
from metakern.inner_loop.path import serve
from metakern.inner_loop.task_model import TaskModel
from metakern.inner_loop.vectorize import Vectorize

#: Learning rates of the batched calls.
Rates = float | Tensor | Mapping[str, float | Tensor] | Sequence[float | Tensor] | nn.ParameterList | nn.ParameterDict

#: Options of meta_loss, which meta_backward takes as well.
_OPTIONS = frozenset({*LoopOptions._fields[1:], "support_mask", "query_mask", "step_weights"})


class _Default(Enum):
    """Sentinel for an omitted argument, where None has a meaning of its own."""

    LEFT_OUT = "left out"

    def __repr__(self) -> str:
        return "..."


class Adapted:
    """The models of T tasks after their inner steps; made by :func:`adapt`.

    Attributes:
        parameters: the adapted parameters by name, [T, *shape] each; meta-gradients flow through them to the model

    Example:
        >>> adapted = adapt(net, (support_x, support_y), loss=F.cross_entropy, steps=5, lr=0.1)
        >>> adapted(query_x).shape
        torch.Size([8, 5, 5])
    """

    def __init__(self, parameters: dict[str, Tensor], model: TaskModel, steps: int) -> None:
        self.parameters = parameters
        self._model, self._steps = model, steps

    def __call__(self, query_x: Data) -> Any:
        """Predictions of every task's model for its own ``query_x``.

        The model's mode at the time of this call, ``train()`` or ``eval()``, applies.

        Args:
            query_x: [T, Q, ...], structured like ``support_x``: a tensor, or a tuple or dict of tensors

        Returns:
            the model's output: a tensor or a tuple, dict or dataclass of tensors, [T, Q, ...] each

        Raises:
            TypeError, ValueError: for an input of another type or another T, and for an output of another type.
        """
        check_samples("query_x", query_x, next(iter(self.parameters.values())).shape[0])
        model, x = self._model.again(), as_data(query_x)
        shared = model.at_step(model.shared, self._steps)

        def predict(instead: Instead) -> Any:
            return model.predict(
                self.parameters, shared, map_tensors(lambda tensor: instead.get(id(tensor), tensor), x)
            )

        return model.vectorization.run(predict, named_tensors("query_x", x))

    def __repr__(self) -> str:
        tasks = next(iter(self.parameters.values())).shape[0]
        model = type(self._model.model).__name__
        return f"Adapted({model}, tasks={tasks}, steps={self._steps}, parameters={len(self.parameters)})"


def adapt(
    model: nn.Module,
    support_x: Data | tuple[Data, Data | None],
    support_y: Data | _Default | None = _Default.LEFT_OUT,
    *,
    loss: Callable[..., Tensor] = F.mse_loss,
    steps: int = 1,
    lr: Rates = DEFAULT_LR,
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
    rule: nn.Module | str | None = None,
) -> Adapted:
    """K gradient steps on the support sets of T tasks at once, each from the model's parameters (MAML's inner loop).

    Finn et al. 2017, arXiv 1703.03400. Meta-gradients, exact to second order, flow from the result to the model's
    parameters, to ``lr`` and to ``support_x``; under ``torch.no_grad()`` none are recorded. ``model`` is not changed.

    Args:
        model: any module that takes [S, ...] and whose parameters are the initialisation of every task. Each evaluation
            starts from the model's buffers and discards what is written into them: in ``train()`` mode batch norm uses
            the statistics of the task's current batch, support or query, and running statistics stay as they are; in
            ``eval()`` mode it uses the running ones. See :func:`per_step_batch_norm` for running statistics of every
            step. Dropout draws a new mask for each task and step.
        support_x: the pair (x, y) of the support sets, as :func:`meta_loss` takes it, or x with y as the next argument.
            x is [T, S, ...]; for a model of several inputs, a tuple of tensors (positional arguments) or a dict of
            tensors (keyword arguments), [T, S, ...] each
        support_y: targets y, [T, S, ...]: a tensor, or a tuple or dict of tensors; None if the loss takes no target.
            If omitted, a tuple of two as ``support_x`` is the pair (x, y)
        loss: function or module that returns the loss [] of one task: ``loss(prediction, y)``, [S, ...] each, or
            ``loss(prediction)`` if y is None. ``prediction`` is the model's output, of any type.
        steps: K; 0 leaves the model as it is
        lr: learning rate α: a number or a tensor of one element; or one rate per parameter tensor, in a dict by name or
            in a list in the order of the adapted parameters: a number or [], [*shape] (Meta-SGD), [K] (LSLR), or
            [K, *shape]. Dict keys may be glob patterns: a parameter without an entry of its own takes the first pattern
            that matches, as in ``{"head.*": 0.1, "*": 0.01}``.
        first_order: FOMAML: treat the inner gradients as constants; or one bool per step. For derivative-order
            annealing pass ``epoch < 50``.
        parameters: glob pattern, or list of them, of the names to adapt, ``"head.*"`` for ANIL; None adapts all that
            require a gradient. The tasks share the other parameters, which receive meta-gradients. Adapted parameters
            that the loss does not depend on stay as they are.
        clip_norm: maximum norm of a task's gradient, over all its adapted tensors; larger gradients are scaled down
        support_mask: bool [T, S], False at padding, for support sets of different sizes: padding does not count in the
            loss. All tasks are evaluated at once for functions of torch.nn.functional, loss modules of torch.nn and a
            ``functools.partial`` of one, with all their options, and ``functools.partial(loss, reduction="sum")`` of
            any loss. Other losses are called task by task, without the padding. Batch norm sees the padding, as copies
            of the task's first sample.
        checkpoint_every: n: keep only the parameters of every n-th step and recompute the steps between in the
            backward: memory for K/n steps' parameters and n steps' graphs. Meta-gradients stay exact, but cannot be
            differentiated again.
        accumulate: number of parts into which each support set is split. Every inner step takes them one after another
            and adds up their gradients; memory holds the activations of one part at a time, as the backward recomputes
            them. Meta-gradients stay exact, but cannot be differentiated again. Batch norm in ``train()`` mode sees one
            part at a time, so its results differ. ``loss`` must be one that ``support_mask`` evaluates at once. The
            fused inner loop, whose memory is small, takes whole sets. torch.compile and the transforms of torch.func
            keep the activations of all parts.
        support_per_step: a separate support set for every inner step: ``support_x``, ``support_y`` and
            ``support_mask`` are [T, K, S, ...]
        vectorize: evaluate all tasks at once by torch.vmap (True), or one after another (False). ``"auto"`` uses
            torch.vmap, and evaluates one after another, with one warning, if torch.vmap cannot run the model: nn.LSTM,
            checkpointing, branches that depend on the data, backward hooks of modules; and without one on the CPU from
            the first call with a convolution of 2^26 products a task or more that no kernel serves, as that is faster.
            In torch.compile and torch.func ``"auto"`` means True. Under torch.vmap :func:`metakern.ops.task_conv2d`
            serves 2-D convolutions without groups or dilation, and :func:`metakern.ops.task_norm_act_pool` their batch
            norm, ReLU and max-pooling by 2, which then have first and second derivatives; but not in torch.compile.
        backend: ``"auto"`` takes the fused inner loop where it serves: chains of ``nn.Linear`` with ReLU, leaky ReLU,
            tanh, sigmoid or GELU between, dropout in ``eval()`` mode and a flatten first, and a mean ``mse_loss``,
            ``cross_entropy`` or ``binary_cross_entropy_with_logits``, which fit the processor's cache; plain PyTorch
            otherwise, with one warning for each reason where a small MLP misses it. ``"cpp"`` raises where the fused
            inner loop cannot serve; ``"reference"`` is plain PyTorch, whose meta-gradients can be differentiated again.
            None is ``"auto"``. Modules of torch.nn are recognised by their classes. Any other model, and a loss of your
            own, is called once on the first task's samples, and served if it calls only these layers and losses and
            changes no attribute or variable. Its other Python code, such as printing, then runs once per call instead
            of once per step. torch.compile recognises classes only. Hooks, replaced methods, and dispatch or function
            modes lead to plain PyTorch.
        explain: print one line that says which of them serves and, for plain PyTorch, why. The logger "metakern" says
            the same at level DEBUG. Compiled calls say nothing.
        rule: update rule that replaces gradient descent (leave ``lr`` out): a :class:`metakern.rules.Rule`, or the name
            of one without weights, such as ``"adam"``; see :func:`metakern.rules.make`. It receives the adapted
            parameters by name, [T, *shape] each, their gradients and the losses [T]. Meta-gradients flow through every
            step, also to the rule's weights; with ``first_order`` the rule's gradients and losses are constants. If the
            rule has an ``initialisation()``, the tasks start there.

    Raises:
        TypeError, ValueError: for invalid arguments, including labels outside the model's outputs; names the argument
        RuntimeError: for a loss that depends on no adapted parameter, and inside ``torch.inference_mode()``.

    Example:
        >>> adapted = adapt(net, (support_x, support_y), loss=F.cross_entropy, steps=5, lr=0.4)
        >>> accuracy = (adapted(query_x).argmax(-1) == query_y).float().mean()
    """
    options = LoopOptions(
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
        rule,
    )
    call = Call("adapt", options.checked(), _pair(support_x, support_y), masks=(support_mask, None))
    return Adapted(serve(call, lambda engine: engine.adapt(call)), task_model(call), options.steps)


def _pair(support_x: Any, support_y: Any) -> tuple[Any, Any]:
    """The support pair (x, y), from either calling form of :func:`adapt`."""
    if support_y is not _Default.LEFT_OUT:
        return support_x, support_y
    return support_x if isinstance(support_x, tuple) and len(support_x) == 2 else (support_x, None)


def meta_loss(
    model: nn.Module,
    support: tuple[Data, Data | None],
    query: tuple[Data, Data | None],
    *,
    loss: Callable[..., Tensor] = F.mse_loss,
    steps: int = 1,
    lr: Rates = DEFAULT_LR,
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
    rule: nn.Module | str | None = None,
) -> Tensor:
    """Query losses [T] of T tasks after K inner steps on their support sets: MAML's meta-objective before the mean.

    ``meta_loss(...).mean().backward()`` gives exact meta-gradients of ``model.parameters()``, and of tensors in ``lr``
    that require gradients. Works in ``torch.compile(fullgraph=True)`` and the transforms of torch.func, but there not
    with ``vectorize=False``, and with ``checkpoint_every`` only where the fused inner loop serves. Plain PyTorch
    serves higher derivatives, forward mode, and torch.func within torch.compile. Compiled calls do not check for labels
    out of range.

    Args:
        model: as for :func:`adapt`, but in ``train()`` mode the call updates the running statistics of
            :class:`PerStepBatchNorm`, also under ``torch.no_grad()``
        support: (x, y), [T, S, ...] each, structured as for :func:`adapt`
        query: (x, y), [T, Q, ...] each
        loss: as for :func:`adapt`, for support and query sets
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
        rule: as for :func:`adapt`

    Returns:
        losses [T]

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`adapt`; RuntimeError also if running statistics would change
            within a transform of torch.func.

    Example:
        >>> optimizer.zero_grad()
        >>> losses = meta_loss(net, (support_x, support_y), (query_x, query_y), loss=F.cross_entropy, steps=5, lr=0.01)
        >>> losses.mean().backward()
        >>> optimizer.step()
    """
    options = LoopOptions(
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
        rule,
    )
    return query_losses(options, support, query, (support_mask, query_mask), step_weights)


def query_losses(
    options: LoopOptions,
    support: tuple[Data, Data | None],
    query: tuple[Data, Data | None],
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
    step_weights: Sequence[float] | Tensor | None = None,
    moves_statistics: bool = True,
) -> Tensor:
    """:func:`meta_loss` for given options; ``moves_statistics=False`` leaves the model's running statistics alone."""
    call = Call("meta_loss", options.checked(), support, query, masks, step_weights, moves_statistics)
    return serve(call, lambda engine: engine.meta_loss(call))


def meta_backward(
    model: nn.Module,
    support: tuple[Data, Data | None],
    query: tuple[Data, Data | None],
    *,
    gradient: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Query losses [T] of :func:`meta_loss`; adds the meta-gradients of their mean to ``grad``.

    Replaces :func:`meta_loss` and ``losses.mean().backward()``, also under ``torch.no_grad()``, and is faster for small
    tasks: the fused inner loop computes meta-gradients without an autograd graph. It does so for an ``nn.Sequential``
    of layers with biases, whose parameters all adapt, are contiguous and have no hooks, with a ``loss`` of
    torch.nn.functional, a number as ``lr``, and no other options than ``steps``, ``first_order``, ``clip_norm``,
    ``checkpoint_every`` and ``backend``. Other calls use autograd, with the same result. Only these run the hooks of
    gradient accumulators, which DistributedDataParallel sets. Several threads may call it on one model, and no gradient
    is lost; where plain PyTorch serves, they take turns.

    Args:
        model: as for :func:`meta_loss`
        support: (x, y), [T, S, ...] each
        query: (x, y), [T, Q, ...] each
        gradient: gradient of the objective by the losses, [T]; None: the objective is their mean. Pass 1/N everywhere
            for one of several parts of a meta-batch of N tasks
        options: those of :func:`meta_loss`

    Returns:
        losses [T], detached

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`meta_loss`; also for a ``gradient`` without the losses' shape,
            dtype and device, and within torch.compile and the transforms of torch.func.

    Example:
        >>> optimizer.zero_grad()
        >>> sets = (support_x, support_y), (query_x, query_y)
        >>> losses = meta_backward(net, *sets, loss=F.cross_entropy, steps=5, lr=0.01)
        >>> optimizer.step()
    """
    if is_transformed():
        raise RuntimeError("meta_backward fills grad, which torch.compile and torch.func do not see; call meta_loss")
    if gradient is not None and not isinstance(gradient, Tensor):
        raise TypeError(f"gradient must be a tensor [T], got {type(gradient).__name__}")
    for name in options.keys() - _OPTIONS:
        raise TypeError(f"meta_backward() got an unexpected keyword argument {name!r}; it takes those of meta_loss")
    masks = options.pop("support_mask", None), options.pop("query_mask", None)
    step_weights = options.pop("step_weights", None)
    chosen = LoopOptions(model, **options).checked()
    call = Call("meta_backward", chosen, support, query, masks, step_weights)
    with nullcontext() if torch.is_grad_enabled() else torch.enable_grad():
        return serve(call, lambda engine: _backward(engine, call, gradient)).detach()


def _backward(engine: Engine, call: Call, gradient: Tensor | None) -> Tensor:
    """Query losses [T]; adds meta-gradients to ``grad`` by the engine's own backward, else by autograd."""
    losses = engine.meta_backward(call, gradient)
    if losses is None:
        losses = engine.meta_loss(call)
        gradient = torch.full_like(losses, 1 / len(losses)) if gradient is None else gradient
        if unlike_losses(gradient, losses):
            got = f"{gradient.dtype} {list(gradient.shape)} on {gradient.device}"
            raise ValueError(f"gradient must be {losses.dtype} [{len(losses)}] on {losses.device}, got {got}")
        losses.backward(gradient)
    return losses


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

    Example:
        >>> multi_step_weights(steps=4, epoch=0, epochs=10)
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
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

    Example:
        >>> with torch.no_grad():
        ...     adapted = adapt(net, (support_x, support_y), loss=F.cross_entropy, steps=5, lr=0.1)
        >>> reptile_step(net, adapted, 0.1)
    """
    check_rate("epsilon", epsilon)
    parameters = dict(model.named_parameters())
    for name, phi in adapted.parameters.items():
        if name not in parameters or parameters[name].shape != phi.shape[1:]:
            raise ValueError(f"model must be the one that was adapted: it has no {name} of shape {list(phi.shape[1:])}")
    for name, phi in adapted.parameters.items():
        parameters[name].add_(epsilon * (phi.mean(0) - parameters[name]))
