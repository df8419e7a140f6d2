"""adapt and meta_loss with one tensor on "meta": an error that names it, and no uninitialised results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakern import adapt, meta_loss
from metakern.maml import meta_backward
from tests.inner_loop.engines.fused import EPISODE, F64, sequential

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("support_x", "support_y", "support_mask", "query_x", "query_y", "query_mask", "lr", "2.weight")


def arguments(wrong: str) -> dict[str, Any]:
    (x, y), (query_x, query_y) = EPISODE.support, EPISODE.query
    masks = (torch.ones(t.shape[:2], dtype=torch.bool) for t in (x, query_x))
    values = (x, y, next(masks), query_x, query_y, next(masks), torch.tensor(0.1, dtype=F64))
    found = dict(zip(NAMES, values, strict=False))
    return {name: v.to("meta") if name == wrong else v for name, v in found.items()}


def models() -> list[nn.Module]:
    """One that is fused and one that is not."""
    return [sequential(), sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 1))]


Call = Callable[[nn.Module, dict[str, Any], str | None], Any]


def by_adapt(net: nn.Module, a: dict[str, Any], backend: str | None) -> Any:
    options = {"support_mask": a["support_mask"], "lr": a["lr"], "steps": 2, "backend": backend}
    return adapt(net, a["support_x"], a["support_y"], **options)


def by_loss(net: nn.Module, a: dict[str, Any], backend: str | None, call: Any = meta_loss) -> Any:
    options = {"lr": a["lr"], "steps": 2, "backend": backend, "loss": F.mse_loss}
    masks = {name: a[name] for name in ("support_mask", "query_mask")}
    return call(net, (a["support_x"], a["support_y"]), (a["query_x"], a["query_y"]), **masks, **options)


@pytest.mark.filterwarnings("ignore:plain PyTorch serves", "ignore:the tasks are evaluated")
@pytest.mark.parametrize("backend", [None, "cpp", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_one_tensor_on_meta(name: str, backend: str | None) -> None:
    calls: list[Call] = [by_loss, lambda net, a, b: by_loss(net, a, b, meta_backward)]
    calls += [] if name.startswith("query") else [by_adapt]
    for call in calls:
        for index, net in enumerate(models()):
            if index and backend == "cpp":
                continue
            if name == "2.weight":
                net[2].to("meta")  # type: ignore[index, operator]
            with pytest.raises((ValueError, RuntimeError), match=r"meta|device"):
                call(net, arguments(name), backend)


@pytest.mark.filterwarnings("ignore:plain PyTorch serves")
def test_the_error_names_the_tensor_and_both_devices() -> None:
    for net in models():
        for name in ("support_x", "support_y", "support_mask", "query_x"):
            given = arguments(name)
            if name.endswith("x"):
                given |= {"support_mask": None, "query_mask": None}
            with pytest.raises(ValueError, match=rf"{name} must be on the device of .*cpu, got meta"):
                by_loss(net, given, None)
        with pytest.raises(ValueError, match=r"query_x must be on the device of .*cpu, got meta"):
            adapt(net, *EPISODE.support)(EPISODE.query[0].to("meta"))


def test_everything_on_meta_has_shapes() -> None:
    for net in models():
        net.to("meta")
        sets = [tuple(t.to("meta") for t in part) for part in (EPISODE.support, EPISODE.query)]
        losses = meta_loss(net, *sets, lr=0.1, backend="reference")  # type: ignore[arg-type]
        assert losses.is_meta
        assert losses.shape == (3,)
