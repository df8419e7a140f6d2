"""The loss of one task, on a whole set, on a padded set without its padding, or on parts of a set.

Axis legend: T tasks, S samples of a task.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap

from metakern.core.transforms import is_batched
from metakern.core.trees import map_output, map_tensors
from metakern.inner_loop.as_shipped import GLOBAL_HOOKS, changed_instance

#: Losses of integer class labels; labels index memory, so their range is checked.
_LABEL_LOSSES = (F.cross_entropy, F.nll_loss)
_LABEL_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)

#: Regression losses: class labels as their targets are a mistake.
_REGRESSION = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)

#: Losses that need equal shapes of prediction and target. PyTorch would broadcast other shapes, with a wrong mean.
_ELEMENTWISE = (*_REGRESSION, F.poisson_nll_loss, F.hinge_embedding_loss, F.soft_margin_loss, F.kl_div)

#: Functions with a known mean, and the options that keep it known: the mean is the sum of ``reduction="none"`` divided
#: by the total weight of the labels that count (_LABEL_LOSSES), or by the number of elements. With a ``weight``,
#: F.mse_loss, F.l1_loss and F.huber_loss divide by its sum; it has the shape of one padded set, so this is unsupported.
_KNOWN: tuple[tuple[Callable[..., Tensor], tuple[str, ...]], ...] = (
    (F.mse_loss, ()),
    (F.cross_entropy, ("weight", "ignore_index", "label_smoothing")),
    (F.binary_cross_entropy_with_logits, ("weight", "pos_weight")),
    (F.l1_loss, ()),
    (F.smooth_l1_loss, ("beta",)),
    (F.huber_loss, ("delta",)),
    (F.nll_loss, ("weight", "ignore_index")),
    (F.binary_cross_entropy, ("weight",)),
    (F.kl_div, ("log_target",)),
    (F.poisson_nll_loss, ("log_input", "full", "eps")),
    (F.soft_margin_loss, ()),
    (F.hinge_embedding_loss, ("margin",)),
    (F.multi_margin_loss, ("p", "margin", "weight")),
    (F.multilabel_margin_loss, ()),
    (F.multilabel_soft_margin_loss, ("weight",)),
)

#: Loss modules, and the functions that they call with options of the same names.
_MODULES: dict[type, Callable[..., Tensor]] = {
    nn.MSELoss: F.mse_loss,
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.L1Loss: F.l1_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.NLLLoss: F.nll_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.KLDivLoss: F.kl_div,
    nn.PoissonNLLLoss: F.poisson_nll_loss,
    nn.SoftMarginLoss: F.soft_margin_loss,
    nn.HingeEmbeddingLoss: F.hinge_embedding_loss,
    nn.MultiMarginLoss: F.multi_margin_loss,
    nn.MultiLabelMarginLoss: F.multilabel_margin_loss,
    nn.MultiLabelSoftMarginLoss: F.multilabel_soft_margin_loss,
}

#: The original ``forward`` of every loss module, to detect patches.
_FORWARDS: dict[type, Any] = {kind: vars(kind)["forward"] for kind in _MODULES}

#: Deprecated options of PyTorch's losses that ``reduction`` replaces.
_LEGACY = ("size_average", "reduce")


class _Sums(NamedTuple):
    """A loss as a sum over samples divided by a count.

    Attributes:
        unreduced: the loss with ``reduction="none"``
        over: the divisor of the sum: "elements", "samples", "labels", or "one"
        options: options of the loss; "labels" uses ``weight`` and ``ignore_index``
    """

    unreduced: Callable[..., Tensor]
    over: str
    options: dict[str, Any]

    def divisor(self, losses: Tensor, y: Any, mask: Tensor) -> Tensor:
        """Divisor [] of the sum of ``losses`` [S, ...] over the samples in ``mask`` [S]."""
        if self.over == "one":
            return losses.new_ones(())
        samples = mask.sum().to(losses.dtype)
        if self.over == "samples":
            return samples
        if self.over == "elements" or y.is_floating_point():
            return samples * losses[0].numel()
        labelled: Tensor = y != self.options.get("ignore_index", -100)
        counted = labelled & _over_samples(mask, labelled)
        weight = self.options.get("weight")
        if weight is None:
            return counted.sum().to(losses.dtype)
        weights = weight[torch.where(counted, y, torch.zeros_like(y))].to(losses.dtype)
        return torch.where(counted, weights, torch.zeros_like(weights)).sum()


class TaskLoss:
    """The user's loss of one task.

    Args:
        loss: ``loss(prediction, y)``, or ``loss(prediction)`` without a target
        in_parts: whether it will be called with masks or for parts of sets
    """

    def __init__(self, loss: Callable[..., Tensor], in_parts: bool) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be callable as loss(prediction, y), got {type(loss).__name__}")
        self.loss = loss
        self.sums = _as_sums(loss) if in_parts else None

    def __call__(self, prediction: Any, y: Any = None, mask: Tensor | None = None) -> Tensor:
        """The loss [] of predictions [S, ...] and targets [S, ...], over the samples in ``mask`` [S] if given."""
        if mask is None:
            return self._whole(prediction, y)
        if self.sums is None:
            if torch.compiler.is_compiling() or is_batched(mask):
                raise TypeError(
                    "loss must be a function of torch.nn.functional, a loss module of torch.nn or a functools.partial "
                    f"of one, where a mask is given and all tasks are evaluated at once; got {self.loss!r}, whose mean "
                    "over some of the samples is not known: pass vectorize=False, which calls it for each task with "
                    "the samples in the mask alone"
                )
            of_samples = functools.partial(_selected, mask=mask)
            return self._whole(map_output(of_samples, prediction), map_tensors(of_samples, y))
        losses = self._unreduced(prediction, y, mask.shape[0])
        precise = losses.float() if losses.dtype in (torch.float16, torch.bfloat16) else losses  # sums may overflow
        count = self.sums.divisor(precise, y, mask)
        total = torch.where(_over_samples(mask, precise), precise, torch.zeros_like(precise)).sum()
        quotient = divided(total, count)
        # If all labels are ignored, PyTorch's mean is NaN, with a gradient of zero. Without any sample (possible only
        # in calls that cannot check masks) the loss is 0, as in the operators.
        ignored = (count == 0) & mask.any()
        return torch.where(ignored, torch.full_like(quotient, torch.nan), quotient).to(losses.dtype)

    @property
    def is_sum(self) -> bool:
        """Whether the losses of parts of a set add up."""
        return self.sums is not None and self.sums.over == "one"

    def counts(self, y: Any, mask: Tensor | None) -> Tensor:
        """Weights [T] of a part's losses in the mean over its whole set, before normalisation; y and mask [T, S]."""
        assert self.sums is not None
        assert mask is not None
        sums, dtype = self.sums, torch.float32 if mask.device.type == "mps" else torch.float64

        def count(mask: Tensor, *targets: Tensor) -> Tensor:
            return sums.divisor(torch.zeros_like(mask, dtype=dtype), targets[0] if targets else None, mask)

        return vmap(count)(mask, *((y,) if sums.over == "labels" else ()))

    def check_parts(self, y: Any) -> None:
        """Raise if the loss cannot be computed from parts of the sets."""
        if self.sums is None:
            raise TypeError(
                "loss must be a function of torch.nn.functional, a loss module of torch.nn or a functools.partial of "
                f"one for accumulate, or a sum; got {self.loss!r}, whose mean over a part of a set is not known: leave "
                "accumulate out, or pass functools.partial(loss, reduction='sum')"
            )
        if isinstance(y, Tensor) and y.is_floating_point():
            for name, option in self.sums.options.items():
                if isinstance(option, Tensor) and option.dim() == y.dim() - 1 and option.shape[0] > 1:
                    raise ValueError(
                        f"loss must not have an option for every sample with accumulate, but {name} has shape "
                        f"{list(option.shape)}; leave accumulate out"
                    )

    @property
    def needs_target(self) -> bool:
        """Whether the loss is a known PyTorch loss; all of these need targets."""
        loss = self.loss.func if isinstance(self.loss, functools.partial) else self.loss
        return type(loss) in _MODULES or any(loss is function for function, _ in _KNOWN)

    def label_range(self, y: Any, name: str) -> tuple[int, int] | None:
        """The smallest and the largest label in ``y``; None if the loss takes no labels or they cannot be read."""
        ignored = ignored_label(self.loss)
        if ignored is None or not isinstance(y, Tensor):
            return None
        if y.dtype not in (torch.int64, torch.int32) and (not y.is_floating_point() or y.dim() == 2):
            raise TypeError(f"{name} must hold class labels as int64, got {y.dtype}")
        capturing = y.is_cuda and torch.cuda.is_current_stream_capturing()
        if y.is_floating_point() or torch.compiler.is_compiling() or capturing:
            return None
        labels = y[y != ignored]
        if not labels.numel():
            return None
        smallest, largest = (int(label) for label in torch.aminmax(labels))
        if smallest < 0:
            raise ValueError(f"{name} must hold class labels from 0, got {smallest}")
        return smallest, largest

    def _unreduced(self, prediction: Any, y: Any, samples: int) -> Tensor:
        assert self.sums is not None
        check_targets(self.loss, prediction, y)
        losses = self.sums.unreduced(prediction) if y is None else self.sums.unreduced(prediction, y)
        if losses.dim() == 0 or losses.shape[0] != samples:
            raise ValueError(
                f"loss must return one value a sample with reduction='none', {samples} here, got shape "
                f"{list(losses.shape)}"
            )
        return losses

    def _whole(self, prediction: Any, y: Any) -> Tensor:
        check_targets(self.loss, prediction, y)
        loss: Any = self.loss(prediction) if y is None else self.loss(prediction, y)
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss must return one number a task, a tensor of shape [], got {got}")
        return loss


def divided(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``, or ``total`` itself, which is 0 then, where ``count`` is 0."""
    return total / torch.where(count == 0, torch.ones_like(count), count)


def ignored_label(loss: Any) -> int | None:
    """The class label that the loss ignores (``ignore_index``); None for losses without class labels."""
    options: dict[str, Any] = {}
    if isinstance(loss, functools.partial):
        loss, options = loss.func, loss.keywords
    if isinstance(loss, _LABEL_MODULES):
        return loss.ignore_index
    return options.get("ignore_index", -100) if loss in _LABEL_LOSSES else None


def check_targets(loss: Any, prediction: Any, y: Any) -> None:
    """Raise if an elementwise loss gets class labels, or targets of another shape, which would broadcast."""
    if isinstance(loss, functools.partial):
        loss = loss.func
    function = _MODULES.get(type(loss), loss) if isinstance(loss, nn.Module) else loss
    if function not in _ELEMENTWISE or not isinstance(prediction, Tensor) or not isinstance(y, Tensor):
        return
    name = getattr(function, "__name__", "the loss")
    if function in _REGRESSION and not y.is_floating_point() and not y.is_complex():
        raise TypeError(
            f"loss= must be given for targets of {y.dtype}, F.cross_entropy for class labels: {name} compares numbers, "
            "which must be floating-point"
        )
    if y.shape != prediction.shape:
        raise ValueError(
            f"targets must have the shape of the predictions of a task, {list(prediction.shape)}, for {name}, got "
            f"{list(y.shape)}, which would be broadcast; reshape them, or pass another loss="
        )


def _as_sums(loss: Any) -> _Sums | None:
    """The loss as a sum divided by a count; None if that form is unknown."""
    function, options = loss, {}
    if isinstance(loss, functools.partial):
        if loss.args:
            return None
        function, options = loss.func, loss.keywords
    if isinstance(function, nn.Module):
        known = _function_of(function) if not options else None
        if known is None:
            return None
        function, options = known
    if any(options.get(name) is not None for name in _LEGACY):
        return None
    reduction = options.get("reduction", "mean")
    rest = {name: value for name, value in options.items() if name != "reduction" and value is not None}
    allowed = [names for each, names in _KNOWN if each is function]
    if not allowed or any(name not in allowed[0] for name in rest):
        # reduction="sum" has a known form for any loss.
        takes = reduction == "sum" and (bool(allowed) or _takes_reduction(function))
        return _Sums(functools.partial(function, **rest, reduction="none"), "one", rest) if takes else None
    over = {"mean": "labels" if function in _LABEL_LOSSES else "elements", "sum": "one"}
    if function is F.kl_div:
        over["batchmean"] = "samples"
    if reduction not in over:
        return None
    return _Sums(functools.partial(function, **rest, reduction="none"), over[reduction], rest)


def _function_of(module: nn.Module) -> tuple[Callable[..., Tensor], dict[str, Any]] | None:
    """The function that a torch loss module calls, and its options; None for modules that may do something else."""
    function = _MODULES.get(type(module))
    if function is None or changed_instance(module) or any(GLOBAL_HOOKS):
        return None
    if (
        vars(type(module)).get("forward") is not _FORWARDS[type(module)]
        or getattr(F, function.__name__) is not function
    ):
        return None
    names = next(names for each, names in _KNOWN if each is function)
    return function, {name: getattr(module, name) for name in ("reduction", *names)}


def _selected(tensor: Tensor, mask: Tensor) -> Tensor:
    """The samples of a tensor [S, ...] that are in the mask [S]."""
    if tensor.dim() == 0 or tensor.shape[0] != mask.shape[0]:
        raise ValueError(
            f"model must return tensors of the samples, [{mask.shape[0]}, ...], where a mask is given, as others may "
            f"depend on padding; got shape {list(tensor.shape)}"
        )
    return tensor[mask]


def _takes_reduction(function: Any) -> bool:
    if torch.compiler.is_compiling():  # torch.compile cannot inspect signatures
        return True
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == "reduction" or p.kind is p.VAR_KEYWORD for p in parameters)


def _over_samples(mask: Tensor, like: Tensor) -> Tensor:
    """The mask [S] with trailing axes added, to broadcast with ``like`` [S, ...]."""
    return mask.view(-1, *[1] * (like.dim() - 1))
