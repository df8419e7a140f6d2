"""Several inputs, by position or keyword; no target; outputs that are tuples, dicts and dataclasses; no inner step."""

from __future__ import annotations

import collections
import copy
from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import metakern
import metakern.learners.clustering
from metakern import adapt, meta_backward, meta_loss
from tests.conftest import assert_close, assert_same_bits
from tests.inner_loops import assert_same, mlp, regression

F64 = torch.float64
EPISODE = regression(3, 6, 5, 2, 1)
MASKS = (torch.arange(6) < torch.tensor([[6], [2], [4]]), torch.arange(5) >= torch.tensor([[0], [1], [3]]))

pytestmark = pytest.mark.usefixtures("one_thread")
both_ways = pytest.mark.parametrize("vectorize", [True, False])


@dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """Output like those of pretrained-model libraries: entries by key, attribute and position; None is omitted."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    kind: str = "two"

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Frozen:
    logits: Tensor
    features: tuple[Tensor, ...]


class Named(NamedTuple):
    logits: Tensor
    features: Tensor


class Model(nn.Module):
    """A network of two inputs and an output of a kind."""

    def __init__(self, kind: Any = Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.first, self.second = kind, nn.Linear(2, 4).double(), nn.Linear(2, 1).double()
        self.head = nn.Linear(4, 1).double()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        features = self.first(x).tanh()
        logits = self.head(features) + (0 if scale is None else self.second(scale))
        if self.kind is Tensor:
            return logits
        if self.kind is Frozen:
            return Frozen(logits, (features, features.mean()))
        if self.kind is ModelOutput:
            return ModelOutput(logits=logits)
        if self.kind in (dict, OrderedDict, collections.UserDict):
            return self.kind(logits=logits, features=features)
        return self.kind(logits, features) if self.kind is Named else self.kind([logits, features])


def logits_of(output: Any) -> Tensor:
    if isinstance(output, (tuple, list)):
        return output[0]
    return output["logits"] if isinstance(output, dict) else output.logits


def loss_of(output: Any, y: Tensor) -> Tensor:
    return F.mse_loss(output if isinstance(output, Tensor) else logits_of(output), y)


def by_hand(model: nn.Module, support: Any, query: Any, steps: int = 2, lr: float = 0.1, loss: Any = loss_of) -> Tensor:
    """Query losses [T] of sets (x, y) of each task, where x is a tuple or a dict, and y may be None."""
    losses = []
    for task_support, task_query in zip(support, query, strict=True):
        params = dict(model.named_parameters())

        def value(params: dict[str, Tensor], x: Any, y: Any) -> Tensor:
            arguments = ((), x) if isinstance(x, dict) else (x, {})
            output = functional_call(model, params, *arguments)
            return loss(output) if y is None else loss(output, y)

        for _ in range(steps):
            used = {n: p for n, p in params.items() if p.requires_grad}
            found = torch.autograd.grad(
                value(params, *task_support), list(used.values()), create_graph=True, allow_unused=True
            )
            for (name, p), g in zip(used.items(), found, strict=True):
                params[name] = p if g is None else p - lr * g
        losses.append(value(params, *task_query))
    return torch.stack(losses)


KINDS = [Tensor, tuple, list, dict, OrderedDict, Named, Frozen, ModelOutput]


@both_ways
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_every_kind(kind: Any, vectorize: bool) -> None:
    model, plain = Model(kind), Model()
    options: dict[str, Any] = {"steps": 2, "lr": 0.1, "vectorize": vectorize}
    losses = meta_loss(model, EPISODE.support, EPISODE.query, loss=loss_of, **options)
    sets = [[((x,), y) for x, y in zip(*part, strict=True)] for part in (EPISODE.support, EPISODE.query)]
    used = [p for name, p in model.named_parameters() if "second" not in name]
    assert_same(losses, by_hand(model, *sets), used)
    output = adapt(model, *EPISODE.support, loss=loss_of, **options)(EPISODE.query[0])
    expected = adapt(plain, *EPISODE.support, **options)(EPISODE.query[0])
    assert type(output) is kind
    got = output if kind is Tensor else logits_of(output)
    assert_close("predictions", got, expected, 1e-12)
    if kind is Frozen:
        assert [part.shape for part in output.features] == [(3, 5, 4), (3,)]
    if kind is ModelOutput:
        assert output.kind == "two"
        assert output.loss is None
        assert list(output) == ["logits", "kind"]
        assert output.logits is output["logits"]
    (got.sum() if kind is not Tensor else output.sum()).backward()
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("kind", [tuple, dict, Named, ModelOutput])
def test_outputs_of_every_kind_with_masks(kind: Any) -> None:
    """The loss gets the unmasked samples of every part of the output."""
    model, seen = Model(kind), []

    def loss(output: Any, y: Tensor) -> Tensor:
        seen.append((type(output), logits_of(output).shape[0], y.shape[0]))
        return loss_of(output, y)

    masks = {"support_mask": MASKS[0], "query_mask": MASKS[1]}
    losses = meta_loss(model, EPISODE.support, EPISODE.query, loss=loss, lr=0.1, vectorize=False, **masks)
    assert seen == [(kind, n, n) for n in (6, 2, 4, 5, 4, 2)]
    sets = [
        [((x[m],), y[m]) for x, y, m in zip(*part, mask, strict=True)]
        for part, mask in ((EPISODE.support, MASKS[0]), (EPISODE.query, MASKS[1]))
    ]
    used = [p for name, p in model.named_parameters() if "second" not in name]
    assert_same(losses, by_hand(model, *sets, steps=1), used)
    with pytest.raises(ValueError, match=r"model must return tensors of the samples, \[6, ...\], where a mask"):
        meta_loss(Model(Frozen), EPISODE.support, EPISODE.query, loss=loss, vectorize=False, **masks)


def test_outputs_that_are_refused() -> None:
    adapted = adapt(Model(collections.UserDict), *EPISODE.support, loss=lambda output, y: loss_of(output["logits"], y))
    with pytest.raises(TypeError, match=r"model must return tensors, or tuples, lists, dicts .*, got a UserDict"):
        adapted(EPISODE.query[0])
    adapted = adapt(Model(), *EPISODE.support)
    adapted._model.model = Model(lambda parts: ("no tensor", None))
    with pytest.raises(TypeError, match=r"model must return at least one tensor, got tuple"):
        adapted(EPISODE.query[0])


class Told(nn.Module):
    """Returns a number besides its output: the same for all tasks, or dependent on the data."""

    def __init__(self, of_data: bool) -> None:
        super().__init__()
        self.net, self.of_data = mlp(2, 4, 1), of_data

    def forward(self, x: Tensor) -> Any:
        return {"logits": self.net(x), "level": x.mean().item() if self.of_data else 0.5}


def test_constants_are_the_same_for_all_tasks() -> None:
    for vectorize in (True, False):
        output = adapt(Told(False), *EPISODE.support, loss=loss_of, vectorize=vectorize)(EPISODE.query[0])
        assert output["level"] == 0.5
    adapted = adapt(Told(True), *EPISODE.support, loss=loss_of, vectorize=False)
    with pytest.raises(TypeError, match=r"model must return tensors for what differs between tasks, got \[.*\] for"):
        adapted(EPISODE.query[0])


def inputs(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, scale = torch.randn(2, 3, samples, 2, generator=generator, dtype=F64)
    return x, scale


@both_ways
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_several_inputs(by_name: bool, masked: bool, vectorize: bool) -> None:
    model, sets, tasks = Model(), [], []
    for part, mask, seed in ((EPISODE.support, MASKS[0], 1), (EPISODE.query, MASKS[1], 2)):
        x: Any = inputs(part[1].shape[1], seed)
        kept = mask if masked else torch.ones_like(mask)
        of_tasks = [tuple(tensor[task][kept[task]] for tensor in (*x, part[1])) for task in range(3)]
        if masked:
            for tensor in x:
                tensor[~mask] = torch.nan
        if by_name:
            tasks.append([({"x": a, "scale": b}, y) for a, b, y in of_tasks])
            sets.append((collections.UserDict(scale=x[1], x=x[0]), part[1]))
        else:
            tasks.append([((a, b), y) for a, b, y in of_tasks])
            sets.append((x, part[1]))
    masks = {"support_mask": MASKS[0], "query_mask": MASKS[1]} if masked else {}
    options: dict[str, Any] = {"steps": 2, "lr": 0.1, "vectorize": vectorize, **masks}
    leaves, expected = list(model.parameters()), by_hand(model, *tasks)
    for every in (None, 1):
        assert_same(meta_loss(model, *sets, checkpoint_every=every, **options), expected, leaves)
    masks.pop("query_mask", None)
    adapted = adapt(model, *sets[0], steps=2, lr=0.1, vectorize=vectorize, **masks)
    for task, (x, _) in enumerate(tasks[1]):
        values = {name: p[task] for name, p in adapted.parameters.items()}
        want = functional_call(model, values, *(((), x) if by_name else (x,)))
        got = adapted(sets[1][0])[task]
        assert_close("predictions", got[MASKS[1][task]] if masked else got, want, 1e-12)
    losses = meta_backward(model, *sets, **options)
    assert_close("losses", losses, expected.detach(), 1e-12)
    expected.mean().backward(inputs=leaves)
    for p in leaves:  # once from meta_backward, once from the loop
        half = torch.autograd.grad(by_hand(model, *tasks).mean(), p)[0]
        assert_close("grad", p.grad, 2 * half, 1e-10)


@both_ways
def test_a_loss_without_a_target(vectorize: bool) -> None:
    model = Model(tuple)

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        return (output[0].squeeze(-1) - output[1].mean(-1)).square().mean()

    sets, tasks = [], []
    for part in (EPISODE.support, EPISODE.query):
        sets.append((part[0], None))
        tasks.append([((x,), None) for x in part[0]])
    losses = meta_loss(model, *sets, loss=loss, steps=2, lr=0.1, vectorize=vectorize)
    leaves = [p for name, p in model.named_parameters() if "second" not in name]
    assert_same(losses, by_hand(model, *tasks, loss=loss), leaves)
    masked = [((x[mask],), None) for x, mask in zip(EPISODE.support[0], MASKS[0], strict=True)]
    options: dict[str, Any] = {"loss": loss, "steps": 2, "lr": 0.1, "support_mask": MASKS[0], "vectorize": False}
    assert_same(meta_loss(model, *sets, **options), by_hand(model, masked, tasks[1], loss=loss), leaves)
    assert_same_bits("adapted", *(adapt(model, *sets[0], loss=loss)(sets[0][0])[0] for _ in range(2)))
    with pytest.raises(TypeError, match=r"support_y must be given: mse_loss compares predictions with targets"):
        adapt(Model(), EPISODE.support[0], None)


def test_targets_of_several_tensors() -> None:
    model = Model(tuple)

    def loss(output: tuple[Tensor, Tensor], y: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(output[0], y["numbers"]) + (output[1].mean(-1) - y["level"]).square().mean()

    sets, tasks = [], []
    for x, y in (EPISODE.support, EPISODE.query):
        targets = {"numbers": y, "level": y[..., 0] / 2}
        sets.append((x, targets))
        tasks.append([((x[t],), {k: v[t] for k, v in targets.items()}) for t in range(3)])
    leaves = [p for name, p in model.named_parameters() if "second" not in name]
    assert_same(meta_loss(model, *sets, loss=loss, steps=2, lr=0.1), by_hand(model, *tasks, loss=loss), leaves)


X, Y = EPISODE.support


@pytest.mark.parametrize(
    ("x", "y", "kind", "message"),
    [
        ([X], Y, TypeError, r"support_x must be a tensor, or a tuple or a dict of tensors, got list"),
        ((), Y, ValueError, r"support_x must hold at least one tensor, got an empty tuple"),
        ({"x": X, "scale": None}, Y, TypeError, r"support_x\['scale'\] must be a tensor, got NoneType"),
        ((X, X[:2]), Y, ValueError, r"support_x\[1\] must begin with \[3, 6\] as the other tensors, got \[2, 6, 2\]"),
        ((X, X[:, :2]), Y, ValueError, r"support_x\[1\] must begin with \[3, 6\]"),
        ((X, X[0, 0]), Y, ValueError, r"support_x\[1\] must be \[T, S, ...\] with at least 1 task"),
        ({"x": X}, (Y, Y[:, 1:]), ValueError, r"support_y\[1\] must .* \[3, 6\]"),
    ],
)
def test_data_that_does_not_fit(x: Any, y: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        adapt(Model(), x, y)


def test_structures_under_torch_compile() -> None:
    model = Model(dict)
    (a, b), (c, d) = inputs(6, 1), inputs(5, 2)

    def evaluated(a: Tensor, b: Tensor, y: Tensor, c: Tensor, d: Tensor) -> Tensor:
        adapted = adapt(model, {"x": a, "scale": b}, y, loss=loss_of, steps=2, lr={"h*": 0.1, "*": 0.2})
        return logits_of(adapted({"x": c, "scale": d}))

    data = (a, b, Y, c, d)
    compiled = torch.compile(evaluated, fullgraph=True, backend="aot_eager")
    assert_close("predictions", compiled(*data), evaluated(*data), 1e-12)


# ------------------------------------------------------------------------------------ no step


@both_ways
@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
def test_no_step_is_the_model_as_it_is(backend: str, vectorize: bool) -> None:
    net = mlp(2, 5, 1)
    options: dict[str, Any] = {"steps": 0, "backend": backend, "vectorize": vectorize, "checkpoint_every": 2}
    adapted = adapt(net, *EPISODE.support, **options)
    for name, p in net.named_parameters():
        assert_same_bits(name, adapted.parameters[name], p.expand(3, *p.shape))
    assert_close("predictions", adapted(EPISODE.query[0]), net(EPISODE.query[0]), 1e-14)
    expected = (net(EPISODE.query[0]) - EPISODE.query[1]).square().mean((1, 2))
    losses = meta_loss(net, EPISODE.support, EPISODE.query, **options)
    assert_same(losses, expected, list(net.parameters()))
    assert_close("losses", meta_backward(net, EPISODE.support, EPISODE.query, **options), expected.detach(), 1e-12)
    for p, want in zip(net.parameters(), torch.autograd.grad(expected.mean(), list(net.parameters())), strict=True):
        assert_close("gradient", p.grad, want, 1e-12)
    with pytest.raises(
        ValueError, match="step_weights weigh the query losses after every inner step, of which steps=0"
    ):
        meta_loss(net, EPISODE.support, EPISODE.query, step_weights=[], **options)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        adapt(net, *EPISODE.support, steps=-1)


@pytest.mark.parametrize("lr", [[0.1] * 4, {"*": torch.ones(0, dtype=F64)}, torch.tensor(0.1)])
def test_no_step_with_rates_of_every_kind(lr: Any) -> None:
    net = mlp(2, 5, 1)
    adapted = adapt(net, *EPISODE.support, steps=0, lr=lr)
    assert_same_bits("weight", adapted.parameters["0.weight"][1], net[0].weight)


# ------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_numbers_of_numpy(backend: str) -> None:
    net = mlp(2, 5, 1)
    sets = EPISODE.support, EPISODE.query
    expected = meta_loss(net, *sets, steps=3, lr=0.125, first_order=True, checkpoint_every=2, backend=backend)
    for integer in (np.int64, np.int32, np.uint8):
        for real in (np.float32, np.float64, np.float16):
            options: dict[str, Any] = {
                "steps": integer(3),
                "lr": real(0.125),
                "first_order": integer(3) < 5,
                "checkpoint_every": integer(2),
                "backend": backend,
            }
            assert_same_bits("losses", meta_loss(net, *sets, **options), expected)
    rates = dict.fromkeys(dict(net.named_parameters()), np.float32(0.125))
    for lr in (rates, list(rates.values())):
        losses = meta_loss(net, *sets, steps=3, lr=lr, first_order=True, backend=backend)
        assert_close("losses", losses, expected, 1e-13)
    clipped = [meta_loss(net, *sets, clip_norm=value) for value in (0.5, np.float32(0.5))]
    assert_same_bits("clipped", clipped[1], clipped[0])
    weights = [0.25, 0.75]
    by_weights = [meta_loss(net, *sets, steps=2, step_weights=w, backend=backend) for w in (weights, np.array(weights))]
    assert_same_bits("weights of steps", by_weights[1], by_weights[0])
    for wrong in (np.bool_(True), np.float32(2), "2"):
        with pytest.raises(TypeError, match="steps must be an integer"):
            adapt(net, *EPISODE.support, steps=wrong)
    with pytest.raises(TypeError, match="lr must be a number or a tensor"):
        adapt(net, *EPISODE.support, lr=np.bool_(True))


# ------------------------------------------------------------------------------------ rates by pattern


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_rates_by_pattern(backend: str) -> None:
    net = mlp(2, 5, 1)
    sets = EPISODE.support, EPISODE.query
    last, steps = torch.tensor([0.3, 0.1], dtype=F64, requires_grad=True), torch.tensor([0.2, 0.4], dtype=F64)
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"2.*": 0.1, "*": 0.01}, {"0.weight": 0.01, "0.bias": 0.01, "2.weight": 0.1, "2.bias": 0.1}),
        ({"*": 0.01, "2.bias": 0.3}, {"0.weight": 0.01, "0.bias": 0.01, "2.weight": 0.01, "2.bias": 0.3}),
        ({"?.weight": 0.2, "0.*": 0.1, "2.b*": 0}, {"0.weight": 0.2, "0.bias": 0.1, "2.weight": 0.2, "2.bias": 0}),
        ({"2.*": last, "*": steps}, {"0.weight": steps, "0.bias": steps, "2.weight": last, "2.bias": last}),
    ]
    for patterns, names in cases:
        options: dict[str, Any] = {"steps": 2, "backend": backend}
        losses, expected = (meta_loss(net, *sets, lr=lr, **options) for lr in (patterns, names))
        assert_same(losses, expected, [*net.parameters(), *([last] if names["2.bias"] is last else [])])


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        ({"head.*": 0.1, "*": 0.01}, r"missing \[\], not among them \['head.\*'\]"),
        ({"2.*": 0.1}, r"missing \['0.weight', '0.bias'\], not among them \[\]"),
        ({"*": 0.01, "2.*": 0.1}, r"lr: '2.\*' comes after '\*', which matches before it; put '2.\*' first"),
        ({"*.bias": 0.1, "*t": 0.2, "2.*": 0.3}, r"lr: '2.\*' comes after '\*t', which matches before it"),
        ({"*": 0.1, 0: 0.2}, r"missing \[\], not among them \[0\]"),
    ],
)
def test_patterns_that_do_not_fit(lr: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapt(mlp(2, 5, 1), *EPISODE.support, lr=lr)


def test_a_model_is_left_as_it_was() -> None:
    model = Model(ModelOutput)
    before = copy.deepcopy(model.state_dict())
    adapt(model, *EPISODE.support, loss=loss_of, steps=2)(EPISODE.query[0])
    for name, tensor in model.state_dict().items():
        assert_same_bits(name, tensor, before[name])


# ------------------------------------------------------------------------------------ what is public


@pytest.mark.parametrize("module", [metakern.maml, metakern.learners.clustering])
def test_modules_list_what_is_public(module: Any) -> None:
    assert dir(module) == sorted(module.__all__)
    assert all(getattr(module, name) is not None for name in module.__all__)
    assert not {"torch", "Tensor", "annotations", "Options"} & set(dir(module))
    assert {name for name in metakern.__all__ if hasattr(metakern.maml, name)} <= {*dir(metakern.maml), "__version__"}
