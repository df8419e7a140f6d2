"""Per-task learners with learn2learn's API: clone a model within the autograd graph, then adapt the clone.

MAML: Finn et al. 2017, arXiv 1703.03400. Meta-SGD: Li et al. 2017, arXiv 1707.09835.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn

from metakern.core.checks import check_rate
from metakern.core.transforms import is_transformed_or_dual
from metakern.core.warn import warn_user
from metakern.inner_loop.attention import math_attention
from metakern.inner_loop.clone import clone_parts, take_step
from metakern.inner_loop.lineage import (
    Lineage,
    foreign,
    listed,
    named_parameters,
    nodes_of,
    reach,
    recomputes,
    tensors_of,
    unregistered,
)
from metakern.inner_loop.substitution import Replaced, is_compiled, shallow_copy

_WITHOUT_GRAD = (
    "clone(), the forward pass and adapt() take gradients, which torch.no_grad() and torch.inference_mode() forbid: "
    "call them outside, or within torch.enable_grad()"
)


class Learner(nn.Module):
    """Base of the per-task learners: wraps a module and passes calls and attribute look-ups on to it."""

    module: nn.Module
    first_order: bool

    def __init__(self, model: nn.Module, lr: float | Tensor) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        check_rate("lr", lr)
        self.module = model
        self._lineage = Lineage()
        # Whether a backward calls the module again, as checkpointing does: it must then hold the forward's parameters.
        self._recomputed = False
        self._lost_grad = False  # whether clone or adapt ran without gradients, so parameters lost their graph
        if any(is_compiled(part) or part._compiled_call_impl is not None for part in model.modules()):
            warn_user(
                f"clones of {type(self).__name__} run the model as it is written, without torch.compile: what that "
                "made is for one module, and most of it cannot be differentiated twice"
            )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # copy and pickle look up special methods; those of the wrapped module would be the wrong ones.
            if name.startswith("__") or "module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the wrapped module.

        Attention uses the implementation that can be differentiated twice, unless the learner is first-order.

        Raises:
            RuntimeError: for a clone whose module computes with the original model's parameters
        """
        with self._attention():
            output = self.module(*args, **kwargs)
        if not is_transformed_or_dual() and self._lineage.begin and torch.is_grad_enabled():
            self._check_own(output, (args, kwargs))
        return output

    def _attention(self) -> AbstractContextManager[None]:
        if self.first_order or not torch.is_grad_enabled():
            return nullcontext()
        return math_attention()

    def _copy(self) -> Self:
        """A learner around a copy of the module, whose parameters stay in the autograd graph of this learner's."""
        clone = shallow_copy(self)
        memo: Replaced = {id(self): (self, clone)}
        held = clone_parts(self.module, memo, also=clone)
        # These are neither parameters nor modules, so nn.Module need not register them.
        clone.__dict__["_lineage"] = self._lineage.of_clone(self.module, memo, held)
        clone.__dict__["_lost_grad"] = self._lost_grad or not torch.is_grad_enabled()
        return clone

    def _check_own(self, output: Any, given: Any) -> None:
        """Raise if the output depends on the original's parameters; warn if on unregistered ones."""
        lineage = self._lineage
        found = lineage.reached(nodes_of(tensors_of(output)), given)
        if not found:
            return
        stale = sorted({name for node, name in found.items() if node in lineage.origins})
        if stale:
            raise RuntimeError(
                f"the module of a {type(self).__name__} clone must compute with its own parameters, but takes "
                f"{listed(stale)} from the model that it was cloned from, which do not adapt{self._references()}. A "
                "function or an object that the model keeps must get the module, or its parameters, in each call; what "
                "is computed with the original beforehand must be an argument"
            )
        strange = sorted(set(found.values()))
        if strange and lineage.strangers:
            lineage.strangers.clear()  # shared by all clones: once is enough
            warn_user(
                f"parameters in {listed(strange)} are not registered in the model, so they do not adapt: use "
                "nn.ModuleList, nn.ModuleDict or nn.ParameterList"
            )

    def _references(self) -> str:
        found = foreign(self.module, self._lineage.original())
        return f" ({'; '.join(found[:4])})" if found else ""

    def _trainable(self) -> tuple[list[tuple[str, Tensor]], list[str]]:
        """Parameters that require gradients, and the names of those that do not."""
        params = named_parameters(self.module)
        if self._lost_grad and not all(p.requires_grad for _, p in params):
            lost = [name for name, p in params if not p.requires_grad]
            raise RuntimeError(f"parameters must require gradients, but {listed(lost)} do not: {_WITHOUT_GRAD}")
        if not params:
            held = sorted({where for where, _ in unregistered(self.module)})
            where = (
                f"; those in {listed(held)} are not registered: use nn.ModuleList or nn.ParameterList" if held else ""
            )
            raise RuntimeError(f"the model must have a parameter to adapt, got none{where}")
        return [pair for pair in params if pair[1].requires_grad], [name for name, p in params if not p.requires_grad]

    def _gradients(
        self, loss: Tensor, params: Sequence[tuple[str, Tensor]], first_order: bool, allow_unused: bool, advice: str
    ) -> list[Tensor | None]:
        """Gradients of the loss, None for parameters on which it does not depend."""
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"loss must be one number, got shape {list(loss.shape)}")
        if not loss.requires_grad:
            why = "" if torch.is_grad_enabled() else f": {_WITHOUT_GRAD}"
            raise RuntimeError(f"loss must depend on the learner's parameters; it does not require a gradient{why}")
        if not params:
            return []
        stops = self._lineage.begin | self._lineage.own
        if not self._recomputed and not is_transformed_or_dual() and recomputes(nodes_of([loss]), stops):
            self._recomputed = True
        tensors, record = [p for _, p in params], not first_order
        grads = torch.autograd.grad(loss, tensors, retain_graph=record, create_graph=record, allow_unused=True)
        unused = [name for (name, _), g in zip(params, grads, strict=True) if g is None]
        if len(unused) == len(params):
            raise RuntimeError(f"loss must depend on the learner's parameters, but on none it does: {self._why(loss)}")
        if unused:
            self._check_unused(loss, unused)
        if unused and not allow_unused:
            raise RuntimeError(f"loss must depend on every parameter, but has no use for {listed(unused)}: {advice}")
        return list(grads)

    def _check_unused(self, loss: Tensor, unused: Sequence[str]) -> None:
        """Raise if the loss depends on the original's parameters instead of the clone's."""
        found = {} if is_transformed_or_dual() else self._lineage.reached(nodes_of([loss]))
        stale = sorted(set(unused) & {name for node, name in found.items() if node in self._lineage.origins})
        if stale:
            raise RuntimeError(
                f"loss must depend on the clone's own {listed(stale)}, but was computed with those of the model that "
                f"it was cloned from{self._references()}, which do not adapt: call the clone, and let what its module "
                "keeps, such as functions and objects of other classes, get the module in each call"
            )

    def _why(self, loss: Tensor) -> str:
        """The likely reason why no parameter receives a gradient."""
        lineage = self._lineage
        found = {} if is_transformed_or_dual() else lineage.reached(nodes_of([loss]))
        if any(node in lineage.origins for node in found):
            return (
                "it was computed with the model that the learner was cloned from; compute it with the learner, as "
                f"learner(x){self._references()}"
            )
        if not is_transformed_or_dual() and reach([loss.grad_fn], lineage.own, dict.fromkeys(lineage.begin, "")):
            return "it was computed before the last adapt(), with the parameters of then; compute it again"
        held = sorted({where for where, _ in unregistered(self.module)})
        if held:
            return f"those in {listed(held)} are not registered in the model; use nn.ModuleList or nn.ParameterList"
        return "compute it with the learner, as learner(x), from tensors that are not detached"

    def _update(self, params: Sequence[tuple[str, Tensor]], grads: Sequence[Tensor | None], lr: Any) -> None:
        """Replace each parameter that has a gradient by p − lr · g, wherever the module holds it."""
        holder = self if self._recomputed else None
        new = take_step(self.module, [p for _, p in params], grads, lr, holder)
        self._lineage.own = set(nodes_of(new))
        if not torch.is_grad_enabled():
            self._lost_grad = True


class MAML(Learner):
    """Model-agnostic meta-learning, one task at a time, with the calls of ``learn2learn.algorithms.MAML``.

    For all tasks of a meta-batch at once see :func:`metakern.adapt` and :func:`metakern.meta_loss`.

    Args:
        model: any module; its parameters are the meta-parameters and it is the learner's ``module``
        lr: α, the learning rate of the inner steps, a number or a tensor of one element, which receives meta-gradients
        first_order: FOMAML: treat the inner gradients as constants
        allow_unused: whether the loss may ignore some parameters, which then stay as they are; None means
            ``allow_nograd``
        allow_nograd: whether parameters with ``requires_grad=False`` are allowed, which then stay as they are

    Buffers that require no gradient are shared between a learner and its clones, as in learn2learn: a clone's batch
    norm updates the model's running statistics. References within the model become references within the clone; see
    :func:`clone_module`. Clones of a model that torch.compile has compiled run uncompiled.

    Raises:
        TypeError, ValueError: for a model that is no module, and an ``lr`` that is not finite or has more elements.
        RuntimeError: when a clone is called whose module still computes with the model's parameters, through a
            reference that cloning cannot replace

    Example:
        >>> maml = MAML(net, lr=0.1)
        >>> learner = maml.clone()
        >>> learner.adapt(F.cross_entropy(learner(support_x[0]), support_y[0]))
        >>> F.cross_entropy(learner(query_x[0]), query_y[0]).backward()  # meta-gradients in maml.parameters()
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        super().__init__(model, lr)
        self.lr = lr
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> Self:
        """A learner for one task; meta-gradients flow through its cloned parameters to this learner's.

        A clone can be cloned, adapted or not. Arguments replace those of the constructor; None keeps them.
        """
        clone = self._copy()
        given = {"first_order": first_order, "allow_unused": allow_unused, "allow_nograd": allow_nograd}
        for name, value in given.items():
            if value is not None:
                setattr(clone, name, value)
        return clone

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One inner step: gradient descent on ``loss`` [], which replaces the learner's parameters.

        Arguments replace those of the constructor for this step; None keeps them.

        Raises:
            TypeError, ValueError: for a loss that is no tensor or not one number.
            RuntimeError: for a loss that depends on no parameter of this learner, whatever is allowed; for parameters
                that require no gradient or do not affect the loss, unless allowed; without gradients.
        """
        first_order = self.first_order if first_order is None else first_order
        allow_unused = self.allow_unused if allow_unused is None else allow_unused
        allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        params, frozen = self._trainable()
        if frozen and not allow_nograd:
            raise RuntimeError(f"parameters must require gradients, but {listed(frozen)} do not: try allow_nograd=True")
        grads = self._gradients(loss, params, first_order, allow_unused, "try allow_unused=True")
        self._update(params, grads, self.lr)


class MetaSGD(Learner):
    """MAML with a learned learning rate for every parameter, with the calls of ``learn2learn.algorithms.MetaSGD``.

    Li et al. 2017, "Meta-SGD", arXiv 1707.09835.

    Args:
        model: any module, the learner's ``module``; parameters that require no gradient stay as they are
        lr: first value of all learning rates
        first_order: treat the inner gradients as constants
        lrs: learning rates instead of ``lr``: one tensor per parameter of the model, of its shape

    Attributes:
        lrs: ``nn.ParameterList``, one entry per parameter of the model; a list of tensors in a clone

    Raises:
        TypeError, ValueError: for a model that is no module, and for ``lrs`` of another number or shape.

    Example:
        >>> learner = MetaSGD(net, lr=0.1)
        >>> clone = learner.clone()
        >>> clone.adapt(F.cross_entropy(clone(support_x[0]), support_y[0]))
        >>> F.cross_entropy(clone(query_x[0]), query_y[0]).backward()  # meta-gradients of learner.lrs, too
    """

    lrs: Any

    def __init__(
        self, model: nn.Module, lr: float = 1.0, first_order: bool = False, lrs: Sequence[Tensor] | None = None
    ) -> None:
        super().__init__(model, lr)
        params = list(model.parameters())
        if lrs is not None and len(lrs) != len(params):
            raise ValueError(f"lrs must have one tensor a parameter, {len(params)}, got {len(lrs)}")
        for index, (rate, p) in enumerate(zip(lrs or (), params, strict=False)):
            if not isinstance(rate, Tensor):
                raise TypeError(f"lrs[{index}] must be a tensor, got {type(rate).__name__}")
            if rate.shape != p.shape:
                raise ValueError(f"lrs[{index}] must have shape {list(p.shape)}, got {list(rate.shape)}")
        self.lrs = lrs or nn.ParameterList([nn.Parameter(torch.full_like(p, float(lr))) for p in params])
        self.first_order = first_order

    def clone(self) -> Self:
        """A learner for one task; meta-gradients flow to this one's parameters and learning rates."""
        clone = self._copy()
        clone._modules.pop("lrs", None)
        clone.lrs = [rate.clone() for rate in self.lrs]
        return clone

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One inner step: gradient descent on ``loss`` [], which replaces the learner's parameters.

        ``first_order`` replaces that of the constructor for this step; None keeps it.

        Raises:
            TypeError, ValueError: for a loss that is no tensor or not one number.
            RuntimeError: for a loss that does not depend on every parameter that requires a gradient, and without
                gradients.
        """
        first_order = self.first_order if first_order is None else first_order
        params, _ = self._trainable()
        advice = "let these not require a gradient, and they stay as they are"
        grads = self._gradients(loss, params, first_order, False, advice)
        named = zip(self.module.parameters(), self.lrs, strict=True)
        self._update(params, grads, [rate for p, rate in named if p.requires_grad])
