"""Masks select samples: losses and meta-gradients equal those of the unpadded sets."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern import adapt, meta_loss
from metakern.inner_loop.task_loss import TaskLoss
from tests.conftest import assert_close
from tests.inner_loops import Episode, assert_same, hand_written, mlp, regression

F64 = torch.float64
MASKS = (torch.arange(6) < torch.tensor([[6], [2], [4]]), torch.arange(5) >= torch.tensor([[0], [1], [3]]))
WEIGHT = torch.tensor([0.2, 1.0, 3.0], dtype=F64)

pytestmark = pytest.mark.usefixtures("one_thread")


class Reshaped(nn.Module):
    """Predictions [S, 3, 2] with classes in the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(2, 4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).view(-1, 3, 2)


class Activated(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(mlp(2, 4, 3), activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def labels(shape: tuple[int, ...], generator: torch.Generator, ignored: int | None = None) -> Tensor:
    y = torch.randint(3, shape, generator=generator)
    if ignored is not None:
        y[:, ::2][torch.rand(y[:, ::2].shape, generator=generator) < 0.5] = ignored
        y[:, 1] = 2  # none is without a label that counts
        y[:, -1] = 1
    return y


def sets(kind: str) -> Episode:
    """x [3, S, 2], and targets of a kind."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for samples in (6, 5):
        x = torch.randn(3, samples, 2, generator=generator, dtype=F64)
        if kind == "labels":
            y = labels((3, samples), generator)
        elif kind.startswith("ignored"):
            y = labels((3, samples), generator, int(kind.split()[1]))
        elif kind == "dense":
            y = labels((3, samples, 2), generator, -100)
        elif kind == "probabilities":
            y = torch.rand(3, samples, 3, generator=generator, dtype=F64).softmax(-1)
        elif kind == "signs":
            y = torch.randn(3, samples, 3, generator=generator, dtype=F64).sign()
        elif kind == "bits":
            y = (torch.rand(3, samples, 3, generator=generator, dtype=F64) < 0.5).to(F64)
        else:
            y = torch.randn(3, samples, 3, generator=generator, dtype=F64)
        made.append((x, y))
    return Episode(*made)


class Weighted(nn.CrossEntropyLoss):
    """A loss module that computes something other than its base class."""

    def forward(self, prediction: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(prediction, y, weight=WEIGHT, reduction=self.reduction)


def weighted(prediction: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(prediction, y, weight=WEIGHT, reduction=reduction)


LOSSES: dict[str, tuple[str, Any]] = {
    "cross entropy": ("labels", F.cross_entropy),
    "weights": ("labels", nn.CrossEntropyLoss(weight=WEIGHT)),
    "weights by partial": ("labels", partial(F.cross_entropy, weight=WEIGHT)),
    "ignored": ("ignored -100", nn.CrossEntropyLoss(weight=WEIGHT)),
    "ignored, plain": ("ignored -100", F.cross_entropy),
    "another ignored": ("ignored 7", nn.CrossEntropyLoss(ignore_index=7)),
    "a class ignored": ("labels", partial(F.cross_entropy, ignore_index=1, weight=WEIGHT)),
    "smoothing": ("ignored -100", nn.CrossEntropyLoss(label_smoothing=0.1)),
    "smoothing, weights": ("ignored -100", nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)),
    "probabilities": ("probabilities", nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)),
    "sum": ("labels", nn.CrossEntropyLoss(WEIGHT, reduction="sum")),
    "sum of squares": ("numbers", partial(F.mse_loss, reduction="sum")),
    "own sum": ("labels", partial(weighted, reduction="sum")),
    "squares": ("numbers", F.mse_loss),
    "absolute": ("numbers", nn.L1Loss()),
    "huber": ("numbers", nn.HuberLoss(delta=0.3)),
    "smooth": ("numbers", partial(F.smooth_l1_loss, beta=0.3)),
    "bits": ("bits", nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT.flip(0))),
    "bits by partial": ("bits", partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHT)),
    "poisson": ("numbers", nn.PoissonNLLLoss()),
    "signs": ("signs", nn.SoftMarginLoss()),
    "hinge": ("signs", nn.HingeEmbeddingLoss(0.7)),
    "margin": ("labels", nn.MultiMarginLoss(p=2, weight=WEIGHT)),
    "several labels": ("bits", nn.MultiLabelSoftMarginLoss(weight=WEIGHT)),
}
MODELS: dict[str, tuple[str, Any, nn.Module]] = {
    "dense": ("dense", nn.CrossEntropyLoss(WEIGHT), Reshaped()),
    "nll": ("ignored -100", nn.NLLLoss(WEIGHT), Activated(nn.LogSoftmax(-1))),
    "bce": ("bits", nn.BCELoss(weight=WEIGHT), Activated(nn.Sigmoid())),
    "kl": ("probabilities", nn.KLDivLoss(reduction="batchmean"), Activated(nn.LogSoftmax(-1))),
    "kl mean": ("probabilities", partial(F.kl_div, reduction="mean"), Activated(nn.LogSoftmax(-1))),
}
CASES = [(kind, loss, mlp(2, 4, 3)) for kind, loss in LOSSES.values()] + list(MODELS.values())
IDS = [*LOSSES, *MODELS]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides", "ignore:There is a performance drop")
@pytest.mark.parametrize(("kind", "loss", "model"), CASES, ids=IDS)
def test_losses_of_masked_sets_are_those_of_the_unpadded(kind: str, loss: Any, model: nn.Module) -> None:
    episode = sets(kind)
    first_order = isinstance(loss, nn.MultiMarginLoss)  # PyTorch has no second derivative of it
    options: dict[str, Any] = {"loss": loss, "first_order": first_order}
    leaves = list(model.parameters())
    expected = hand_written(model, episode, 2, lambda *_: 0.1, **options, masks=MASKS)
    whole = hand_written(model, episode, 2, lambda *_: 0.1, **options)
    options |= {"steps": 2, "lr": 0.1}
    true = {"support_mask": torch.ones(3, 6).bool(), "query_mask": torch.ones(3, 5).bool()}
    for backend, vectorize in (("auto", True), ("reference", True), ("reference", False)):
        options.update(backend=backend, vectorize=vectorize)
        masked = meta_loss(model, episode.support, episode.query, support_mask=MASKS[0], query_mask=MASKS[1], **options)
        assert_same(masked, expected, leaves)
        assert_same(meta_loss(model, episode.support, episode.query, **options, **true), whole, leaves)


def test_the_value_of_weighted_labels() -> None:
    """Two labels of one sample each: the mean is by the weights, 0.2 and 3, not by the samples."""
    net = nn.Linear(1, 3).double()
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    x, y = torch.zeros(1, 2, 1, dtype=F64), torch.tensor([[0, 2]])
    losses = -net.bias.log_softmax(0)
    mask = torch.ones(1, 2).bool()
    query = meta_loss(net, (x, y), (x, y), steps=1, lr=0.0, loss=nn.CrossEntropyLoss(WEIGHT), query_mask=mask)
    assert_close("loss", query, ((0.2 * losses[0] + 3 * losses[2]) / 3.2).reshape(1), 1e-12)


@pytest.mark.parametrize("loss", [lambda p, y: F.cross_entropy(p, y, WEIGHT), weighted, Weighted()])
def test_losses_whose_mean_is_not_known(loss: Any) -> None:
    """Batched they are refused; looped over tasks, they get only the unmasked samples."""
    episode, net = sets("labels"), mlp(2, 4, 3)
    options: dict[str, Any] = {"steps": 2, "lr": 0.1, "loss": loss, "support_mask": MASKS[0], "query_mask": MASKS[1]}
    with pytest.raises(TypeError, match=r"loss must be a function of torch.nn.functional, .*: pass vectorize=False"):
        meta_loss(net, episode.support, episode.query, vectorize=True, **options)
    expected = hand_written(net, episode, 2, lambda *_: 0.1, loss=loss, masks=MASKS)
    losses = meta_loss(net, episode.support, episode.query, vectorize=False, **options)
    assert_same(losses, expected, list(net.parameters()))
    with pytest.warns(UserWarning, match=r"the tasks are evaluated one after another, .* loss must be a function"):
        losses = meta_loss(net, episode.support, episode.query, **options)
    assert_same(losses, expected, list(net.parameters()))


@pytest.mark.parametrize(
    "change",
    [
        lambda loss: loss.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda loss: setattr(loss, "forward", lambda p, y: 2 * F.mse_loss(p, y)),
    ],
)
def test_loss_modules_that_were_changed(change: Any) -> None:
    episode, net, loss = sets("numbers"), mlp(2, 4, 3), nn.MSELoss()
    change(loss)
    options: dict[str, Any] = {"steps": 2, "lr": 0.1, "loss": loss, "support_mask": MASKS[0], "query_mask": MASKS[1]}
    losses = meta_loss(net, episode.support, episode.query, vectorize=False, backend="reference", **options)
    doubled = hand_written(net, episode, 2, lambda *_: 0.1, loss=lambda p, y: 2 * F.mse_loss(p, y), masks=MASKS)
    assert_same(losses, doubled, list(net.parameters()))
    with pytest.raises(TypeError, match="whose mean over some of the samples is not known"):
        meta_loss(net, episode.support, episode.query, vectorize=True, backend="reference", **options)


def twice_mse(prediction: Tensor, y: Tensor, **_: Any) -> Tensor:
    return 2 * (prediction - y).square().mean()


@pytest.mark.parametrize("place", ["class", "function", "hooks"])
def test_losses_that_were_changed_for_all_modules(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    episode, net = sets("numbers"), mlp(2, 4, 3)
    options: dict[str, Any] = {"steps": 2, "lr": 0.1, "support_mask": MASKS[0], "query_mask": MASKS[1]}
    doubled = hand_written(net, episode, 2, lambda *_: 0.1, loss=twice_mse, masks=MASKS)
    hook = None
    if place == "class":
        monkeypatch.setattr(nn.MSELoss, "forward", lambda self, p, y: twice_mse(p, y))
    elif place == "function":
        monkeypatch.setattr(F, "mse_loss", twice_mse)
    else:
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, _, output: 2 * output if isinstance(module, nn.MSELoss) else None
        )
    try:
        losses = meta_loss(net, episode.support, episode.query, loss=nn.MSELoss(), vectorize=False, **options)
        assert_same(losses, doubled, list(net.parameters()))
        with pytest.raises(TypeError, match="whose mean over a part of a set is not known"):
            meta_loss(net, episode.support, episode.query, loss=nn.MSELoss(), **{**options, "accumulate": 2})
    finally:
        if hook is not None:
            hook.remove()


@pytest.mark.parametrize("masked", [False, True])
def test_tasks_without_a_label_that_counts(masked: bool) -> None:
    """PyTorch's mean over nothing is NaN, with a gradient of zero: the parameters stay, as in a loop by hand."""
    x, y = torch.randn(2, 3, 2, dtype=F64), torch.tensor([[-100, -100, -100], [0, 1, -100]])
    mask = torch.ones(2, 3).bool() if masked else None
    net = mlp(2, 4, 3)
    adapted = adapt(net, x, y, loss=F.cross_entropy, lr=0.1, support_mask=mask)
    for name, p in net.named_parameters():
        assert_close(name, adapted.parameters[name][0], p, 0)
        assert bool((adapted.parameters[name][1] != p).any())
    query_mask = mask if masked else None
    losses = meta_loss(net, (x, y), (x, y), loss=F.cross_entropy, lr=0.1, query_mask=query_mask)
    assert losses[0].isnan()
    assert losses[1].isfinite()


@pytest.mark.parametrize("loss", [F.mse_loss, nn.CrossEntropyLoss(WEIGHT), nn.KLDivLoss(reduction="batchmean")])
def test_a_task_without_any_sample_has_no_loss(loss: Any) -> None:
    """Public functions refuse such masks where they can look at them; compiled calls agree with the operators."""
    prediction = torch.randn(4, 3, dtype=F64, requires_grad=True)
    y = torch.randint(3, (4,)) if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(4, 3, dtype=F64)
    value = TaskLoss(loss, True)(prediction, y, torch.zeros(4).bool())
    assert value.item() == 0
    assert_close("gradient", torch.autograd.grad(value, prediction)[0], torch.zeros(4, 3, dtype=F64), 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_beyond_half_precision(dtype: torch.dtype) -> None:
    """The sum of 1,000 losses of 100 is beyond float16; their mean is not."""
    net = nn.Linear(1, 1).to(dtype)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.fill_(10)
    x, y = torch.zeros(1, 1000, 1, dtype=dtype), torch.zeros(1, 1000, 1, dtype=dtype)
    losses = meta_loss(net, (x, y), (x, y), lr=0.0, query_mask=torch.ones(1, 1000).bool())
    assert losses.dtype == dtype
    assert_close("loss", losses, torch.tensor([100.0], dtype=dtype), 2**-7)


def test_masks_under_torch_compile() -> None:
    episode, net = regression(3, 6, 5, 2, 3), mlp(2, 4, 3)
    y = episode.support[1].argmax(-1), episode.query[1].argmax(-1)
    loss = partial(F.cross_entropy, weight=WEIGHT, ignore_index=1)

    def losses(x: Tensor, query: Tensor) -> Tensor:
        masks = {"support_mask": MASKS[0], "query_mask": MASKS[1]}
        return meta_loss(net, (x, y[0]), (query, y[1]), steps=2, lr=0.1, loss=loss, **masks)

    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    data = episode.support[0], episode.query[0]
    assert_same(compiled(*data), losses(*data), list(net.parameters()), 1e-12)
