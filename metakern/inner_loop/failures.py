"""Diagnosis of a model's errors: names the caller's argument whose dtype, device or shape does not fit the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metakern.core.torch_private import ConvNd, NormBase

#: Layers that do not accept integer inputs.
_OF_NUMBERS = (nn.Linear, ConvNd, NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.RNNBase, nn.RNNCellBase)


#: Replacement tensors, by the id of the tensor to replace.
Instead = Mapping[int, Tensor]

#: Whether an evaluation succeeds with these replacements.
Works = Callable[[Instead], bool]


class Failed(NamedTuple):
    """The innermost module that an error passed through, and its argument ``input`` if it has one."""

    label: str
    module: nn.Module
    input: Tensor | None


def module_that_failed(error: BaseException, model: nn.Module) -> Failed | None:
    """The innermost of the model's modules in whose forward the error was raised."""
    names = {id(module): name for name, module in model.named_modules()}
    found, traceback = None, error.__traceback__
    while traceback is not None:
        module = _module_of(traceback.tb_frame)
        if module is not None and id(module) in names:
            name, given = names[id(module)], traceback.tb_frame.f_locals.get("input")
            label = f"module {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
            found = Failed(label, module, given if isinstance(given, Tensor) else None)
        traceback = traceback.tb_next
    return found


def _module_of(frame: FrameType) -> nn.Module | None:
    module = frame.f_locals.get("self")
    return module if isinstance(module, nn.Module) else None


def explained(error: Exception, model: nn.Module, data: Mapping[str, Tensor], works: Works) -> Exception:
    """An error that names the data that do not fit the model, or ``error`` itself if nothing is found.

    Data of another dtype or device are the cause if the evaluation succeeds once they are converted.

    Args:
        error: raised by the model or its gradient
        model: the module
        data: the caller's tensors, by their names in messages
        works: whether the evaluation succeeds with some of ``data`` replaced
    """
    return (
        _of_dtype(error, model, data, works) or _of_device(model, data, works) or _of_width(error, model, data) or error
    )


def check_no_mixed_meta(model: nn.Module, data: Mapping[str, Tensor]) -> None:
    """Raise ValueError if only some tensors are on "meta": PyTorch's gradients would be uninitialised memory."""
    parameters = dict(model.named_parameters())
    name, device = next(((name, p.device) for name, p in parameters.items()), ("", None))
    of = f"the model's {name}"
    for other, tensor in {**data, **{f"the model's {n}": p for n, p in parameters.items()}}.items():
        if device is not None and tensor.device != device and "meta" in (tensor.device.type, device.type):
            raise ValueError(f"{other} must be on the device of {of}, {device}, got {tensor.device}")


def _of_dtype(error: Exception, model: nn.Module, data: Mapping[str, Tensor], works: Works) -> TypeError | None:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) != 1:
        return None
    expected = dtypes.pop()
    failed = module_that_failed(error, model)
    got_integers = (
        failed is not None
        and isinstance(failed.module, _OF_NUMBERS)
        and failed.input is not None
        and not (failed.input.is_floating_point() or failed.input.is_complex())
    )
    wrong = {
        name: tensor
        for name, tensor in data.items()
        if tensor.dtype != expected and (tensor.is_floating_point() or (got_integers and _is_input(name)))
    }
    if not wrong or not works({id(tensor): tensor.to(expected) for tensor in wrong.values()}):
        return None
    name, tensor = next(iter(wrong.items()))
    other = f", or convert the model by model.to({tensor.dtype})" if tensor.is_floating_point() else ""
    return TypeError(
        f"{name} must have the dtype of the model's parameters, {expected}, got {tensor.dtype}: pass "
        f"{name}.to({expected}){other}"
    )


def _of_device(model: nn.Module, data: Mapping[str, Tensor], works: Works) -> ValueError | None:
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        return None
    expected = devices.pop()
    wrong = {name: tensor for name, tensor in data.items() if tensor.device != expected}
    if not wrong or not works({id(tensor): tensor.to(expected) for tensor in wrong.values()}):
        return None
    name, tensor = next(iter(wrong.items()))
    return ValueError(
        f"{name} must be on the device of the model's parameters, {expected}, got {tensor.device}: pass "
        f"{name}.to({str(expected)!r}), or move the model by model.to({str(tensor.device)!r})"
    )


def _of_width(error: Exception, model: nn.Module, data: Mapping[str, Tensor]) -> ValueError | None:
    failed = module_that_failed(error, model)
    if failed is None or failed.input is None or failed.input.is_nested:
        return None
    wanted = _wanted(failed.module, failed.input)
    if wanted is None:
        return None
    samples = ", ".join(f"{name} {list(x.shape)}" for name, x in data.items() if _is_input(name))
    return ValueError(
        f"{samples} must fit the model: {failed.label} takes {wanted[0]}, got {wanted[1]} in an input of shape "
        f"{list(failed.input.shape)} (one task's); pass samples of another shape, or change the layer"
    )


def _is_input(name: str) -> bool:
    return name.partition("[")[0].endswith("_x")


def _wanted(module: Any, x: Tensor) -> tuple[str, str] | None:
    """What size a layer expects and what it got; None if the input fits or the layer is unknown."""
    size: tuple[Any, Any, str] | None = None
    if isinstance(module, nn.Linear):
        size = module.in_features, x.shape[-1] if x.dim() else None, "features"
    elif isinstance(module, ConvNd):
        rank = len(module.kernel_size)
        if x.dim() not in (rank + 1, rank + 2):
            return f"{rank + 1} or {rank + 2} axes", str(x.dim())
        size = module.in_channels, x.shape[-rank - 1], "channels"
    elif isinstance(module, NormBase):
        size = module.num_features, x.shape[1] if x.dim() > 1 else None, "channels"
    elif isinstance(module, nn.GroupNorm):
        size = module.num_channels, x.shape[1] if x.dim() > 1 else None, "channels"
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        shape = list(module.normalized_shape)
        size = shape, list(x.shape[-len(shape) :]), "as last axes"
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        size = module.input_size, x.shape[-1] if x.dim() else None, "features"
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and x.numel():
        low, high = (int(index) for index in torch.aminmax(x))
        inside = low >= 0 and high < module.num_embeddings
        return None if inside else (f"indices from 0 to {module.num_embeddings - 1}", str(low if low < 0 else high))
    if size is None or size[0] == size[1]:
        return None
    return f"{size[0]} {size[2]}", str(size[1])
