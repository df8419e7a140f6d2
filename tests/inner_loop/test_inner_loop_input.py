"""Arguments that do not fit: each error names the argument, what was expected and what came."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import adapt, meta_loss
from metakern.maml import multi_step_weights, reptile_step
from tests.inner_loops import Tied, mlp, regression

EPISODE = regression(3, 4, 5, 2, 2)
SUPPORT, QUERY = EPISODE.support, EPISODE.query


def call(net: nn.Module | None = None, support: Any = SUPPORT, query: Any = QUERY, **options: Any) -> Tensor:
    return meta_loss(net or mlp(2, 3, 2), support, query, **options)


class FirstOnly(nn.Sequential):
    """Two layers, of which the second has no part in the output."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


@pytest.mark.parametrize("name", ["checkpoint_every", "accumulate"])
def test_counts(name: str) -> None:
    for value in (0, -1):
        with pytest.raises(ValueError, match=rf"{name} must be at least 1, got {value}"):
            call(**{name: value})
    for value in (1.5, True, "2"):
        with pytest.raises(TypeError, match=rf"{name} must be an integer, got {value!r}"):
            call(**{name: value})


@pytest.mark.parametrize(
    ("support", "query", "message"),
    [
        (
            (SUPPORT[0][:0], SUPPORT[1][:0]),
            QUERY,
            r"support_x must be \[T, S, ...\] with .* \[0, 4, 2\]",
        ),
        ((SUPPORT[0][:, :0], SUPPORT[1][:, :0]), QUERY, r"support_x must be .* at least 1 .*, got shape \[3, 0, 2\]"),
        ((SUPPORT[0][:, 0, 0], SUPPORT[1]), QUERY, r"support_x must be .*, got shape \[3\]"),
        ((SUPPORT[0], SUPPORT[1][:2]), QUERY, r"support_y must share \[T, S\] with support_x, \[3, 4\], got \[2, 4\]"),
        (
            (SUPPORT[0], SUPPORT[1][:, :3]),
            QUERY,
            r"support_y must share \[T, S\] .*, \[3, 4\], got \[3, 3\]",
        ),
        (SUPPORT, (QUERY[0][:2], QUERY[1][:2]), r"query_x must share the task axis, T = 3, got shape \[2, 5, 2\]"),
        (SUPPORT, (QUERY[0][:, :0], QUERY[1][:, :0]), r"query_x must be .* at least 1 .*, got shape \[3, 0, 2\]"),
        (SUPPORT, (QUERY[0][:0], QUERY[1][:0]), r"query_x must be .* at least 1 .*, got shape \[0, 5, 2\]"),
        (SUPPORT, (QUERY[0], QUERY[1][:, :4]), r"query_y must share \[T, S\] with query_x, \[3, 5\], got \[3, 4\]"),
        (
            (SUPPORT[0].transpose(0, 1), SUPPORT[1].transpose(0, 1)),
            QUERY,
            r"query_x must share the task axis, T = 4, got shape \[3, 5, 2\]",
        ),
        (SUPPORT, (QUERY[0], QUERY[1][:1]), r"query_y must share the task axis, T = 3, got shape \[1, 5, 2\]"),
    ],
)
def test_shapes(support: Any, query: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(None, support, query)


def test_kinds_of_data() -> None:
    with pytest.raises(TypeError, match=r"support must be a pair \(support_x, support_y\), got Tensor"):
        call(None, SUPPORT[0])
    with pytest.raises(TypeError, match=r"support must be a pair \(support_x, support_y\), got tuple"):
        call(None, (*SUPPORT, None))
    with pytest.raises(TypeError, match=r"query_y must be a tensor, or a tuple or a dict of tensors, got list"):
        call(None, SUPPORT, (QUERY[0], [1]))
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got function"):
        call(lambda x: x)
    adapted = adapt(mlp(2, 3, 2), *SUPPORT)
    with pytest.raises(ValueError, match=r"query_x must share the task axis, T = 3, got shape \[2, 5, 2\]"):
        adapted(QUERY[0][:2])
    with pytest.raises(ValueError, match=r"query_x must be \[T, S, ...\] with .* 1 sample, got shape \[3, 0, 2\]"):
        adapted(QUERY[0][:, :0])
    with pytest.raises(TypeError, match=r"query_x must be a tensor, or a tuple or a dict of tensors, got list"):
        adapted([1])
    with pytest.raises(ValueError, match=r"model must have a parameter that requires a gradient, got none"):
        adapt(nn.ReLU(), *SUPPORT)


def test_inference_mode() -> None:
    with torch.inference_mode():
        made_there = torch.ones(3, 4, 2, dtype=torch.float64)
        with pytest.raises(RuntimeError, match=r"torch.inference_mode\(\) forbids; use torch.no_grad"):
            call()
    with pytest.raises(RuntimeError, match=r"support_x was made in torch.inference_mode"):
        call(None, (made_there, SUPPORT[1]))


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (torch.ones(3, 4), TypeError, r"support_mask must be a bool tensor, got torch.float32"),
        ([[True]], TypeError, r"support_mask must be a bool tensor, got list"),
        (
            torch.ones(3, 4, device="meta").bool(),
            ValueError,
            r"support_mask must be on the device of .*, got meta",
        ),
        (torch.ones(4, 3).bool(), ValueError, r"support_mask must be \[T, S\], \[3, 4\], got \[4, 3\]"),
        (
            torch.tensor([[0], [1], [0]]).expand(3, 4).bool(),
            ValueError,
            r"every task a sample, .* tasks \[0, 2\]",
        ),
    ],
)
def test_masks(mask: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(support_mask=mask)


def test_losses() -> None:
    with pytest.raises(TypeError, match=r"loss must be callable as loss\(prediction, y\), got str"):
        call(loss="mse")
    with pytest.raises(ValueError, match=r"loss must return one number a task, .*, got shape \[4, 2\]"):
        call(loss=partial(F.mse_loss, reduction="none"))
    for vectorize in (True, False):
        for shape in ([1], [4]):
            with pytest.raises(ValueError, match=rf"one number a task, a tensor of shape \[\], got shape \{shape}"):
                call(loss=lambda prediction, y, n=shape[0]: (prediction - y).mean(1)[:n], vectorize=vectorize)
    with pytest.raises(ValueError, match=r"loss must return one number a task, .*, got tuple"):
        call(loss=lambda prediction, y: ((prediction - y).mean(), y))
    with pytest.raises(ValueError, match=r"loss must return one number a task, .*, got float"):
        call(loss=lambda prediction, y: 1.0, vectorize=False)
    with pytest.raises(RuntimeError, match=r"loss must depend on the adapted parameters, \['0.weight', .*; it"):
        call(loss=lambda prediction, y: y.mean())
    with pytest.raises(RuntimeError, match=r"loss must depend on the adapted parameters, \['2.weight', '2.bias'\]"):
        call(FirstOnly(nn.Linear(2, 2).double(), nn.Tanh(), nn.Linear(2, 2).double()), parameters="2.*")
    mask = torch.ones(3, 4).bool()
    with pytest.raises(TypeError, match=r"loss must be a function of torch.nn.functional, .*; got <function .*, whose"):
        call(loss=lambda prediction, y: (prediction - y).square().mean(), support_mask=mask, vectorize=True)
    total = partial(lambda prediction, y, reduction: (prediction - y).sum(), reduction="sum")
    with pytest.raises(ValueError, match=r"one value a sample with reduction='none', 4 here, got shape \[\]"):
        call(loss=total, support_mask=mask)


@pytest.mark.parametrize(
    "loss", [F.cross_entropy, nn.CrossEntropyLoss(), F.nll_loss, partial(F.cross_entropy, label_smoothing=0.1)]
)
def test_labels_are_checked_before_the_loss(loss: Any) -> None:
    def label(value: int, shape: tuple[int, int] = (3, 4)) -> Tensor:
        y = torch.zeros(shape, dtype=torch.int64)
        y[1, 2] = value
        return y

    query = (QUERY[0], label(1, (3, 5)))
    with pytest.raises(ValueError, match=r"support_y must hold class labels from 0, got -1"):
        call(None, (SUPPORT[0], label(-1)), query, loss=loss)
    with pytest.raises(ValueError, match=r"support_y must be 0 to 1, as the model has 2 outputs, got 2"):
        call(None, (SUPPORT[0], label(2)), query, loss=loss)
    with pytest.raises(ValueError, match=r"query_y must be 0 to 1, as the model has 2 outputs, got 7"):
        call(None, (SUPPORT[0], label(1)), (QUERY[0], label(7, (3, 5))), loss=loss)
    assert call(None, (SUPPORT[0], label(-100)), query, loss=loss).isfinite().all()  # ignored by default
    mask = torch.ones(3, 4).bool()
    mask[1, 2] = False
    assert call(None, (SUPPORT[0], label(9)), query, loss=loss, support_mask=mask).isfinite().all()  # padding


def test_which_labels_are_ignored() -> None:
    y, query = torch.full((3, 4), 5), (QUERY[0], torch.ones(3, 5, dtype=torch.int64))
    y[:, 0] = 1
    for loss in (partial(F.cross_entropy, ignore_index=5), nn.CrossEntropyLoss(ignore_index=5)):
        assert call(None, (SUPPORT[0], y), query, loss=loss).isfinite().all()


@pytest.mark.parametrize("loss", [F.cross_entropy, nn.NLLLoss()])
def test_labels_of_another_kind(loss: Any) -> None:
    query = (QUERY[0], torch.ones(3, 5, dtype=torch.int64))
    for dtype in (torch.float32, torch.uint8, torch.bool):
        with pytest.raises(TypeError, match=rf"support_y must hold class labels as int64, got {dtype}"):
            call(None, (SUPPORT[0], torch.ones(3, 4, dtype=dtype)), query, loss=loss)
    with pytest.raises(TypeError, match=r"query_y must hold class labels as int64, got torch.float64"):
        call(None, (SUPPORT[0], torch.ones(3, 4, dtype=torch.int64)), (QUERY[0], QUERY[1][..., 0]), loss=loss)
    assert (
        call(None, (SUPPORT[0], SUPPORT[1].softmax(-1)), (QUERY[0], QUERY[1].softmax(-1)), loss=F.cross_entropy)
        .ge(0)
        .all()
    )


def test_parameters() -> None:
    for patterns in (1, [1], ["0.*", None]):
        with pytest.raises(TypeError, match=r"parameters must be a glob pattern or a list of them, got "):
            call(parameters=patterns)
    with pytest.raises(ValueError, match=r"parameters: 'head.\*' matches none .* gradient; there are \['0"):
        call(parameters="head.*")
    with pytest.raises(ValueError, match=r"parameters must name at least one pattern, got none"):
        call(parameters=[])
    frozen = mlp(2, 3, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"model must have a parameter that requires a gradient, got none"):
        call(frozen)
    frozen[0].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"parameters: '2.\*' matches none that requires a gradient"):
        call(frozen, parameters="2.*")


NET = mlp(2, 3, 2)
RATES = {name: torch.rand_like(p) for name, p in NET.named_parameters()}


@pytest.mark.parametrize(
    ("lr", "kind", "message"),
    [
        ("0.1", TypeError, r"lr must be a number or a tensor, got str"),
        (True, TypeError, r"lr must be a number or a tensor, got bool"),
        (float("inf"), ValueError, r"lr must be finite, got inf"),
        (torch.ones(2), ValueError, r"lr as one tensor must have 1 element, got shape \[2\]"),
        (None, TypeError, r"lr must be a number or a tensor, got NoneType"),
        (
            torch.ones(5).double(),
            ValueError,
            r"1 element, got shape \[5\]; for one a parameter or step give a dict or a",
        ),
        ([0.1] * 5, ValueError, r"lr must have one entry an adapted parameter, 4, got 5"),
        ([0.1] * 3 + [float("nan")], ValueError, r"lr\['2.bias'\] must be finite, got nan"),
        (nn.ParameterList([torch.ones(())] * 3), ValueError, r"one entry an adapted parameter, 4, got 3"),
        (dict.fromkeys(RATES, torch.ones(6).double()), ValueError, r"\['0.weight'\] .* or \[5\] or .*, got \[6\]"),
        (
            {n: torch.ones(4, *p.shape).double() for n, p in RATES.items()},
            ValueError,
            r"lr\['0.weight'\] must have .* or \[5, 3, 2\], got \[4, 3, 2\]",
        ),
        ([0.1], ValueError, r"lr must have one entry an adapted parameter, 4, got 1"),
        ({"0.weight": 0.1}, ValueError, r"missing \['0.bias', '2.weight', '2.bias'\], not among them \[\]"),
        ({**RATES, "5.bias": 0.1}, ValueError, r"missing \[\], not among them \['5.bias'\]"),
        ({**RATES, "0.bias": "x"}, TypeError, r"lr\['0.bias'\] must be a number or a tensor, got str"),
        ({**RATES, "0.bias": torch.ones(4).double()}, ValueError, r"lr\['0.bias'\] must have shape .*, got \[4\]"),
        (
            {**RATES, "0.bias": torch.ones(3)},
            TypeError,
            r"lr\['0.bias'\] must have the parameter's dtype, .*64",
        ),
    ],
)
def test_learning_rates(lr: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call(NET, lr=lr, steps=5)


def test_other_options() -> None:
    with pytest.raises(TypeError, match=r"first_order must be a bool or a sequence of bools, got 1"):
        call(first_order=1)
    with pytest.raises(ValueError, match=r"first_order must have one bool a step, 2, got 3"):
        call(first_order=[True] * 3, steps=2)
    with pytest.raises(TypeError, match=r"clip_norm must be a number, got '1'"):
        call(clip_norm="1")
    for clip_norm in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"clip_norm must be positive and finite, got {clip_norm}"):
            call(clip_norm=clip_norm)
    with pytest.raises(ValueError, match=r"step_weights must be finite, got \[nan\]"):
        call(step_weights=[float("nan")])
    with pytest.raises(ValueError, match=r"step_weights must have one weight a step, 2, got 3"):
        call(step_weights=[1, 1, 1], steps=2)
    with pytest.raises(ValueError, match=r"step_weights must have one weight a step, \[2\], got \[3\]"):
        call(step_weights=torch.ones(3), steps=2)
    with pytest.raises(TypeError, match=r"step_weights must be a tensor or a sequence of numbers, got 1"):
        call(step_weights=1)
    with pytest.raises(ValueError, match=r"step_weights must not all be zero, got \[0, 0\]"):
        call(step_weights=[0, 0], steps=2)
    with pytest.raises(ValueError, match=r"epoch must be at least 0, got -1"):
        multi_step_weights(3, -1, 10)
    with pytest.raises(ValueError, match=r"epochs must be at least 1, got 0"):
        multi_step_weights(3, 0, 0)
    with pytest.raises(ValueError, match=r"epsilon must be finite, got nan"):
        reptile_step(NET, adapt(NET, *SUPPORT), float("nan"))


def test_the_callers_tensors_and_model_stay_as_they_are() -> None:
    torch.manual_seed(0)
    x = [t.clone() for t in (*SUPPORT, *QUERY)]
    net = Tied()
    state = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(ValueError, match="one number a task"):
        call(net, (SUPPORT[0], SUPPORT[1][..., :1]), QUERY, loss=partial(F.mse_loss, reduction="none"))
    mask = torch.tensor([True, False, True, True]).expand(3, 4)
    call(NET, support_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(x, (*SUPPORT, *QUERY), strict=True))
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
