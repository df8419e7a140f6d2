"""The backend that ``auto`` takes on a GPU, tested without one by fake tensors."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from metakern import FallbackWarning
from metakern.core import backend as _backend
from metakern.ops import mlp_inner_loop, mlp_meta_loss
from metakern.ops.mlp_inner_loop import MAX_TRITON_OUTPUTS

#: The package holds a function of the module's name.
MODULE = importlib.import_module("metakern.ops.mlp_inner_loop")


class Served(Exception):
    """Raised with the serving backend's name, as these tensors cannot be computed with."""


@pytest.fixture
def triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with Triton kernels but without CUDA kernels."""
    monkeypatch.setattr(_backend, "_warned", set())
    monkeypatch.setattr(_backend, "missing", lambda name, device: "" if name == "triton" else "no kernels for it")
    properties = SimpleNamespace(shared_memory_per_block_optin=2**17)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def serve(name: str, *_: Any) -> None:
        raise Served(name)

    monkeypatch.setattr(MODULE, "_reference", lambda *_: serve("reference"))
    monkeypatch.setattr(MODULE, "adapt_call", serve)
    monkeypatch.setattr(MODULE, "meta_loss_call", serve)


def call(name: str, outputs: int, **options: Any) -> Any:
    with FakeTensorMode():
        params = [torch.empty(outputs, 2, device="cuda"), torch.empty(outputs, device="cuda")]
        support = torch.empty(3, 4, 2, device="cuda"), torch.empty(3, 4, outputs, device="cuda")
        if name == "mlp_inner_loop":
            return mlp_inner_loop(params, *support, lr=0.1, steps=1, **options)
        return mlp_meta_loss(params, support, support, lr=0.1, steps=1, **options)


NAMES = ("mlp_inner_loop", "mlp_meta_loss")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("triton_on_a_gpu")
def test_auto_falls_back_where_tritons_limits_refuse(name: str) -> None:
    message = f"the model has more than 8 layers or {MAX_TRITON_OUTPUTS} outputs"
    with pytest.warns(FallbackWarning, match=message) as caught, pytest.raises(Served, match=r"^reference$"):
        call(name, MAX_TRITON_OUTPUTS + 1)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("triton_on_a_gpu")
def test_triton_asked_for_by_name_says_why_it_does_not_serve(name: str) -> None:
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: the model has more than 8 layers or"):
        call(name, MAX_TRITON_OUTPUTS + 1, backend="triton")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("triton_on_a_gpu")
def test_auto_takes_triton_within_its_limits(name: str) -> None:
    with pytest.raises(Served, match=r"^triton$"):
        call(name, MAX_TRITON_OUTPUTS)
