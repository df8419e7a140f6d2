"""Corrected forms of PyTorch functions whose derivatives are wrong in the inner loop, and kernels for slow ones.

Derivatives are wrong for two causes: batching rules of torch.vmap whose result autograd differentiates wrongly, and
functions without a second derivative. The list comes from comparing torch's operators under vmap with a loop: values,
gradients, second derivatives.

Axis legend: N indices, B bags, V rows of a table, D its columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metakern.core.transforms import is_batched, wants_gradient
from metakern.inner_loop.task_layers import TaskLayers
from metakern.inner_loop.task_norms import TaskNorms

#: An index beyond any table.
_OUTSIDE = 2**40

_NO_NAMES: Mapping[int, str] = {}


class TaskFunctions(TorchFunctionMode):
    """Mode that redirects calls of these functions to their corrected forms, and layers to kernels for all tasks.

    Args:
        vectorize: whether the model runs under torch.vmap
        transformed: whether torch.compile or torch.func transforms the call; gradients are then taken inside
            torch.vmap, otherwise outside
        layers: the kernels, which serve under torch.vmap, but not in torch.compile: there torch.func.grad does not take
            operators that register a gradient (pytorch issue 170834)
        names: the model's parameters by the ids of this task's tensors
        auto: whether a loop over the tasks may evaluate the model instead
    """

    def __init__(
        self,
        vectorize: bool,
        transformed: bool,
        layers: TaskLayers | None = None,
        names: Mapping[int, str] = _NO_NAMES,
        auto: bool = False,
    ) -> None:
        super().__init__()
        self.replaced = _EVERYWHERE
        self.layers, self.names = layers if vectorize and not torch.compiler.is_compiling() else None, names
        self.norms = None if self.layers is None else TaskNorms(self.layers, names)
        self.auto = auto and not transformed
        if vectorize:
            self.replaced = _TRANSFORMED if transformed else _BATCHED

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if type(func) is FunctionType and not torch.compiler.is_compiling() and func not in _SHIPPED:
            func = _behind(func)
        if self.layers is not None and self.norms is not None:
            joined, args, kwargs = self.norms.call(func, types, args, kwargs or {})
            if joined is not None:
                return joined
            if self.layers.serves(func):
                return self.layers.conv2d(self.names, self.auto, *args, **kwargs)
        return self.replaced.get(func, func)(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        if self.norms is not None and error[0] is None:
            self.norms.finish()
        super().__exit__(*error)


#: Functions of torch.nn.functional by name, and all PyTorch functions that are written in Python.
_FUNCTIONALS = {name: f for name, f in vars(F).items() if type(f) is FunctionType}
_SHIPPED = frozenset(
    f for owner in (F, torch.functional, Tensor) for f in vars(owner).values() if type(f) is FunctionType
)


def _behind(func: Callable[..., Any]) -> Callable[..., Any]:
    """The function of torch.nn.functional that a caller has patched with ``func``; ``func`` itself if there is none.

    PyTorch's functions pass modes the object under their public name, so a patch that calls the original would recurse.
    """
    return next((f for name, f in _FUNCTIONALS.items() if getattr(F, name, None) is func), func)


# --------------------------------------------------------------------------------------------------------- embeddings


def _batched_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """F.embedding under vmap, whose batching rule joins all tasks' tables: only the first task's has a padding row.

    ``scale_grad_by_freq`` would count over all tasks there, and has no second derivative.
    """
    _refuse_max_norm(max_norm)
    if input.dtype not in (torch.int32, torch.int64):
        return F.embedding(input, weight)  # raises PyTorch's own error
    inside = (input >= 0) & (input < weight.shape[0])
    input = torch.where(inside, input.long(), _OUTSIDE)  # it might hit another task's table
    rows = F.embedding(input, weight, padding_idx)
    if scale_grad_by_freq:
        entries = input.flatten()
        table = torch.zeros_like(weight[:, 0], dtype=torch.float32)
        counts = table.scatter_add(0, entries, torch.ones_like(entries, dtype=torch.float32))
        constant = rows.detach()
        rows = constant + (rows - constant) / F.embedding(input, counts.unsqueeze(1)).to(rows.dtype)  # the same value
    if padding_idx is not None:
        padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
        rows = torch.where(padding, rows.detach(), rows)
    return rows


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """F.embedding of one task, with a dense gradient, and a second derivative with ``scale_grad_by_freq``."""
    _refuse_max_norm(max_norm)
    if scale_grad_by_freq:
        return _batched_embedding(input, weight, padding_idx, scale_grad_by_freq=True)
    return F.embedding(input, weight, padding_idx)


def _in_order_of_torch(embedding: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Adapter for torch.embedding, which takes the weight first."""

    def call(
        weight: Tensor, indices: Tensor, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
    ) -> Tensor:
        padding = None if padding_idx < 0 else padding_idx
        return embedding(indices, weight, padding, scale_grad_by_freq=scale_grad_by_freq)

    return call


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """F.embedding_bag, which has no second derivative, by embedding and reduction."""
    _refuse_max_norm(max_norm)
    fits = mode == "sum" or (mode == "mean" and per_sample_weights is None)
    fits = fits or (mode == "max" and per_sample_weights is None and not scale_grad_by_freq)
    if not fits or (input.dim(), offsets is None) not in ((2, True), (1, False)):
        return F.embedding_bag(  # raises PyTorch's own error
            input,
            weight,
            offsets,
            scale_grad_by_freq=scale_grad_by_freq,
            mode=mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
        )
    rows = _batched_embedding(input, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    inside = torch.ones_like(input, dtype=torch.bool) if padding_idx is None else input != padding_idx % weight.shape[0]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    if offsets is not None:  # bags are contiguous in [N]: a mask [B, N] assigns indices to bags
        starts = offsets[:-1] if include_last_offset else offsets
        bag = (torch.arange(input.shape[0], device=input.device).unsqueeze(1) >= starts).sum(1) - 1
        inside = (bag == torch.arange(starts.shape[0], device=input.device).unsqueeze(1)) & inside
        rows = rows.unsqueeze(0)
    inside = inside.unsqueeze(-1)
    if mode == "max":
        largest = torch.where(inside, rows, -math.inf).max(1).values
        return torch.where(inside.any(1), largest, 0.0)
    total = torch.where(inside, rows, 0.0).sum(1)
    return total / inside.sum(1).clamp(min=1) if mode == "mean" else total


def _refuse_max_norm(max_norm: float | None) -> None:
    if max_norm is not None:
        raise ValueError(
            f"an embedding must not have max_norm, got {max_norm}: it rescales rows of the model's weight in place, "
            "which would change the model, and the other tasks with it; set max_norm=None, and rescale what is looked "
            "up in the model's forward"
        )


def _embedding_renorm(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> Tensor:
    _refuse_max_norm(max_norm)
    raise AssertionError


# -------------------------------------------------------------------------------------------------------------- norms


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm, for gradients taken inside torch.vmap: PyTorch's then treats mean and variance as constants."""
    rest = running_mean, running_var, weight, bias, training, momentum, eps
    if not training:
        return F.batch_norm(input, *rest)
    with torch.no_grad():  # updates the running statistics, and checks the arguments
        F.batch_norm(input.detach(), *rest)
    return _affine(_normalised(input, [0, *range(2, input.dim())], eps), weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.instance_norm, corrected for the same reason as batch norm."""
    rest = running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    if not use_input_stats:
        return F.instance_norm(input, *rest)
    with torch.no_grad():
        F.instance_norm(input.detach(), *rest)
    return _affine(_normalised(input, list(range(2, input.dim())), eps), weight, bias)


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """F.layer_norm, corrected for the same reason as batch norm."""
    if tuple(input.shape[-len(normalized_shape) :]) != tuple(normalized_shape):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)  # raises PyTorch's own error
    normalised = _normalised(input, list(range(-len(normalized_shape), 0)), eps)
    normalised = normalised if weight is None else normalised * weight
    return normalised if bias is None else normalised + bias


def _in_order_of_torch_norm(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Adapter for torch.batch_norm and torch.instance_norm, which take weight and bias first."""

    def call(x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any) -> Tensor:
        return norm(x, mean, var, weight, bias, training, *rest[:2])

    return call


def _refused(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(
        "torch.native_layer_norm and torch.native_batch_norm have wrong second derivatives in torch.func and "
        "torch.compile; use torch.nn.functional.layer_norm and batch_norm"
    )


def _normalised(x: Tensor, dims: list[int], eps: float) -> Tensor:
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) * (variance + eps).rsqrt()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Scale and shift each channel of [N, C, ...]."""
    shape = [-1] + [1] * (x.dim() - 2)
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


# ------------------------------------------------------------------------------------------------------------- others


def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """torch.select_scatter, whose batching rule selects the gradient of ``src`` along the wrong axis."""
    index = index % input.shape[dim]
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, index, index + 1)


def _index_fill(input: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    """torch.index_fill, whose batching rule writes the values of all tasks into an input that they share."""
    if not isinstance(value, Tensor):
        return torch.index_fill(input, dim, index, value)
    filled = torch.zeros(input.shape[dim], dtype=torch.bool, device=input.device).index_fill(0, index, True)
    shape = [1] * input.dim()
    shape[dim] = -1
    return torch.where(filled.reshape(shape), value.to(input.dtype), input)


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """F.one_hot, whose batching rule returns zeros for a class out of range."""
    if num_classes < 0:
        return F.one_hot(tensor)
    shape = (*tensor.shape, num_classes)
    return torch.zeros(shape, dtype=torch.int64, device=tensor.device).scatter(-1, tensor.unsqueeze(-1), 1)


def _as_strided_(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.as_strided_, whose batching rule applies the strides to the memory of all tasks; refused under vmap."""
    if is_batched(input):
        raise RuntimeError("as_strided_ is wrong under torch.vmap; use as_strided")
    return input.as_strided_(*args, **kwargs)


def _linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """F.linear_cross_entropy without chunks: in chunks it has no second derivative."""
    result: Tensor = F.linear_cross_entropy(*args, **kwargs)
    return result


_EVERYWHERE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.embedding: _embedding,
    torch.embedding: _in_order_of_torch(_embedding),
    F.embedding_bag: _embedding_bag,
    torch.embedding_renorm_: _embedding_renorm,
}
if hasattr(F, "linear_cross_entropy"):
    _EVERYWHERE[F.linear_cross_entropy] = _linear_cross_entropy

_VMAP: dict[Callable[..., Any], Callable[..., Any]] = {
    **_EVERYWHERE,
    F.embedding: _batched_embedding,
    torch.embedding: _in_order_of_torch(_batched_embedding),
    torch.select_scatter: _select_scatter,
    Tensor.select_scatter: _select_scatter,
    F.one_hot: _one_hot,
    torch.index_fill: _index_fill,
    Tensor.index_fill: _index_fill,
    Tensor.as_strided_: _as_strided_,
}

#: For gradients taken outside torch.vmap. vmap hides ``requires_grad``, so a model that branches on it would behave
#: differently than in a loop.
_BATCHED: dict[Callable[..., Any], Callable[..., Any]] = {**_VMAP}
_BATCHED[Tensor.requires_grad.__get__] = wants_gradient  # type: ignore[attr-defined]

#: For gradients taken inside torch.vmap.
_TRANSFORMED: dict[Callable[..., Any], Callable[..., Any]] = {
    **_VMAP,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _in_order_of_torch_norm(_batch_norm),
    F.instance_norm: _instance_norm,
    torch.instance_norm: _in_order_of_torch_norm(_instance_norm),
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.native_layer_norm: _refused,
    torch.native_batch_norm: _refused,
}
