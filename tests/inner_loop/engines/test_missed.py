"""The warning that plain PyTorch serves a small MLP: once per reason, and in no other case."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import FallbackWarning, adapt, meta_loss
from metakern.core import backend as _backend
from metakern.inner_loop.engines import missed as _missed
from metakern.maml import meta_backward
from tests.inner_loop.engines.fused import EPISODE, F64, sequential
from tests.inner_loops import Episode

pytestmark = [pytest.mark.usefixtures("one_thread", "forgotten")]


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_missed, "_said", set())


def softplus() -> nn.Sequential:
    return sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 1))


def heard(model: nn.Module, episode: Episode = EPISODE, **options: Any) -> list[str]:
    """Warning messages of one call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        meta_loss(model, episode.support, episode.query, **options)
    for warning in caught:
        assert warning.filename == __file__, "the warning points at the user's line"
    return [str(w.message) for w in caught if w.category is FallbackWarning]


def test_a_reason_is_said_once_with_the_ratio() -> None:
    (message,) = heard(softplus())
    assert "3 to 56 times as long as the fused inner loop" in message
    assert "Softplus" in message
    assert heard(softplus()) == []
    assert heard(sequential(nn.Linear(2, 3), nn.Softplus(), nn.Linear(3, 1))) == [], "another size is no other reason"
    (message,) = heard(sequential(), loss=nn.L1Loss())
    assert "l1_loss" in message
    (message,) = heard(Sine().double())
    assert "sin" in message


def test_reasons_that_are_remembered_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_missed, "_MOST_SAID", 1)
    assert len(heard(softplus())) == 1
    assert heard(sequential(), loss=nn.L1Loss()) == []
    assert len(_missed._said) == 1


@pytest.mark.filterwarnings("always:plain PyTorch serves")
def test_every_call_says_it_at_the_users_line(recwarn: pytest.WarningsRecorder) -> None:
    adapt(softplus(), *EPISODE.support)
    assert recwarn.pop(FallbackWarning).filename == __file__
    _missed._said.clear()
    meta_backward(softplus(), EPISODE.support, EPISODE.query)
    assert recwarn.pop(FallbackWarning).filename == __file__


SERVED_OR_CHOSEN: dict[str, tuple[Any, dict[str, Any]]] = {
    "served": (sequential, {}),
    "reference": (softplus, {"backend": "reference"}),
    "loop": (softplus, {"vectorize": False}),
    "no steps": (softplus, {"steps": 0}),
    "batch norm": (lambda: sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1)), {}),
    "layer norm": (lambda: sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 1)), {}),
    "softmax": (lambda: sequential(nn.Linear(2, 5), nn.Softmax(-1), nn.Linear(5, 1)), {}),
    "dropout": (lambda: sequential(nn.Linear(2, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 1)).train(), {}),
    "large": (lambda: sequential(nn.Linear(2, 1500), nn.ReLU(), nn.Linear(1500, 1)), {}),
    "branches": (lambda: Branches().double(), {}),
}


class Sine(nn.Module):
    """An activation that is not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).sin())


class Branches(nn.Module):
    """Linear layers that do not form a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], 1).relu())


@pytest.mark.parametrize("name", SERVED_OR_CHOSEN)
def test_others_are_not_bothered(name: str) -> None:
    make, options = SERVED_OR_CHOSEN[name]
    assert heard(make(), **options) == []


def test_convolutions_are_not_bothered() -> None:
    net = sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    sets = [(torch.randn(2, n, 1, 4, 4, dtype=F64), torch.randn(2, n, 1, dtype=F64)) for n in (3, 2)]
    assert heard(net, Episode(*sets)) == []


def test_a_package_without_kernels_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once overall, not once per kind of call."""
    monkeypatch.setattr(_backend, "_C", None)
    monkeypatch.setattr(_backend, "_missing", "there are none")
    monkeypatch.setattr(_backend, "_warned", set())
    for net in (sequential(), softplus()):
        assert not [message for message in heard(net) if "small MLP" in message]


def test_errors_come_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        with pytest.raises(TypeError):
            meta_loss(softplus().float(), EPISODE.support, EPISODE.query)
        labels = torch.full((3, 4), 7)
        with pytest.raises(ValueError, match="support_y"):
            adapt(sequential(), EPISODE.support[0], labels, loss=F.cross_entropy)


def test_the_ratio_is_the_measured_one() -> None:
    path = Path(__file__).parents[3] / "bench" / "results" / "amd-epyc-2-threads-avx512-inner-loop.json"
    cells = json.loads(path.read_text())["cells"]
    ratios = [cell["speedup"]["vmap"] for cell in cells if "vmap" in cell["speedup"]]
    assert f"{min(ratios):.0f} to {max(ratios):.0f} times" == _missed._RATIO
