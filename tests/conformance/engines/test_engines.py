"""Every engine of the inner loop against the loop by hand, in float64: values, meta-gradients, refusals.

A new engine joins by one row of :data:`ROWS`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.inner_loop.arguments import Call, LoopOptions
from metakern.inner_loop.engines import ENGINES, Engine, Unserved
from metakern.inner_loop.engines.generic import GenericEngine
from metakern.inner_loop.engines.mlp import MlpEngine
from metakern.inner_loop.path import serve
from metakern.rules import Adam, CoordinatewiseLSTM, GradientDescent, MetaLSTM, Momentum, RNNProp
from tests.conformance.engines.by_hand import by_hand
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

T, S, Q, K = 3, 4, 5, 3
VALUES, GRADIENTS = 1e-12, 1e-10


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def mlp() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)))


class Residual(nn.Module):
    """A user's model with a shared parameter and normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)
        self.skip = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh()) + self.skip * x[..., :2]


class Inertia(nn.Module):
    """A rule with a state, a weight per tensor, a dependence on the loss, and learned initial parameters."""

    def __init__(self, start: nn.Module | None = None) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(0.6, dtype=torch.float64))
        self.rate = nn.Parameter(torch.tensor(0.05, dtype=torch.float64))
        named = {} if start is None else {n: p for n, p in start.named_parameters() if p.requires_grad}
        self.start = nn.ParameterDict({n.replace(".", "/"): nn.Parameter(p.detach() + 0.1) for n, p in named.items()})

    def initialisation(self) -> dict[str, Tensor] | None:
        return {name.replace("/", "."): p for name, p in self.start.items()} or None

    def init_state(self, params: dict[str, Tensor], *, tasks: bool = False) -> Any:
        assert not tasks or len({p.shape[0] for p in params.values()}) == 1
        return {name: torch.zeros_like(p) for name, p in params.items()}

    def forward(self, params: Any, grads: Any, state: Any, *, loss: Tensor | None = None) -> Any:
        assert loss is not None
        new, new_state = {}, {}
        for name, p in params.items():
            new_state[name] = self.decay * state[name] + grads[name]
            scale = self.rate * torch.rsqrt(1 + loss).view(-1, *[1] * (p.dim() - 1))
            new[name] = p - scale * new_state[name]
        return new, new_state


def lstm() -> nn.Module:
    torch.manual_seed(3)
    return CoordinatewiseLSTM(hidden_size=4, output_scale=0.5).double()


def rnnprop() -> nn.Module:
    torch.manual_seed(3)
    return RNNProp(hidden_size=4).double()


def meta_lstm(model: nn.Module) -> nn.Module:
    """With a start beside the model's parameters, and inner gates that are not saturated."""
    torch.manual_seed(3)
    rule = MetaLSTM({n: p + 0.1 for n, p in trained(model)}, hidden_size=4).double()
    with torch.no_grad():
        rule.head.bias.mul_(0.3)
        rule.lstm.weight_ih_l0.mul_(30)
    return rule


#: Options of each case besides data, K steps and rates of 0.1; a function is called with the model.
CASES: dict[str, dict[str, Any]] = {
    "one step": {"steps": 1},
    "steps": {},
    "many steps": {"steps": 7, "lr": 0.02},
    "no step": {"steps": 0},
    "first order": {"first_order": True},
    "first order by step": {"first_order": [True, False, True]},
    "clipped": {"clip_norm": 0.3},
    "clipped, first order": {"clip_norm": 0.3, "first_order": True},
    "part of the parameters": {"parameters": ["last.*", "4.*"]},
    "a frozen parameter": {"frozen": True},
    "a rate as a tensor": {"lr": lambda model: torch.tensor(0.1, dtype=torch.float64, requires_grad=True)},
    "rates by parameter": {"lr": lambda model: {n: learned(p.shape) for n, p in trained(model)}},
    "rates by step": {"lr": lambda model: {n: learned((K,)) for n, _ in trained(model)}},
    "rates by pattern": {"lr": {"*weight": 0.1, "*": 0.05}},
    "masks": {"masks": True},
    "masks, first order": {"masks": True, "first_order": True},
    "multi-step loss": {"step_weights": [0.2, 0.0, 0.8]},
    "multi-step loss, learned weights": {
        "step_weights": lambda model: torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
    },
    "multi-step loss, first order": {"step_weights": [0.2, 0.3, 0.5], "first_order": True},
    "checkpoints": {"checkpoint_every": 2},
    "checkpoints, first order": {"checkpoint_every": 1, "first_order": True},
    "checkpoints, masks, multi-step loss": {"checkpoint_every": 2, "masks": True, "step_weights": [0.2, 0.3, 0.5]},
    "parts of the sets": {"accumulate": 3},
    "parts, checkpoints": {"accumulate": 2, "checkpoint_every": 2},
    "support sets by step": {"support_per_step": True},
    "support sets by step, masks": {"support_per_step": True, "masks": True},
    "one task after another": {"vectorize": False},
    "torch.vmap": {"vectorize": True},
    "classes": {"loss": F.cross_entropy},
    "classes, masks": {"loss": F.cross_entropy, "masks": True},
    "binary": {"loss": F.binary_cross_entropy_with_logits},
    "a loss of the user's": {"loss": lambda p, y: (p - y).square().mean()},
    "another loss": {"loss": F.l1_loss},
    "plain PyTorch by name": {"backend": "reference"},
    "C++ by name": {"backend": "cpp"},
    "a rule": {"rule": lambda model: Inertia()},
    "a rule, first order": {"rule": lambda model: Inertia(), "first_order": True},
    "a rule, first order by step": {"rule": lambda model: Inertia(), "first_order": [False, True, False]},
    "a rule, clipped": {"rule": lambda model: Inertia(), "clip_norm": 0.3},
    "a rule, checkpoints": {"rule": lambda model: Inertia(), "checkpoint_every": 2},
    "a rule, checkpoints, first order": {"rule": lambda model: Inertia(), "checkpoint_every": 2, "first_order": True},
    "a rule, masks": {"rule": lambda model: Inertia(), "masks": True},
    "a rule, multi-step loss": {"rule": lambda model: Inertia(), "step_weights": [0.2, 0.3, 0.5]},
    "a rule, parts, checkpoints": {"rule": lambda model: Inertia(), "accumulate": 2, "checkpoint_every": 1},
    "a rule, one task after another": {"rule": lambda model: Inertia(), "vectorize": False},
    "a rule, support sets by step": {"rule": lambda model: Inertia(), "support_per_step": True},
    "a rule, part of the parameters": {"rule": lambda model: Inertia(), "parameters": ["last.*", "4.*"]},
    "a rule: LSTM": {"rule": lambda model: lstm()},
    "a rule: LSTM, checkpoints": {"rule": lambda model: lstm(), "checkpoint_every": 2},
    "a rule: RNNProp": {"rule": lambda model: rnnprop()},
    "a rule: RNNProp, first order, checkpoints": {
        "rule": lambda model: rnnprop(),
        "first_order": True,
        "checkpoint_every": 2,
    },
    "a rule: Meta-LSTM, with a start": {"rule": meta_lstm},
    "a rule: Meta-LSTM, with a start, first order by step": {"rule": meta_lstm, "first_order": [True, False, True]},
    "a rule: Meta-LSTM, with a start, masks, checkpoints": {"rule": meta_lstm, "masks": True, "checkpoint_every": 1},
    "a rule: momentum": {"rule": lambda model: Momentum(0.1)},
    "a rule: Adam, first order": {"rule": lambda model: Adam(0.1), "first_order": True},
    "a rule: Adam, checkpoints": {"rule": lambda model: Adam(0.1), "checkpoint_every": 1},
    "descent as a rule": {"rule": lambda model: GradientDescent(0.1)},
    "descent as a rule, learned rate": {"rule": lambda model: GradientDescent(nn.Parameter(drawn().abs()))},
    "descent as a rule, clipped twice": {
        "rule": lambda model: GradientDescent(0.1, clip_norm=0.3),
        "clip_norm": 0.5,
    },
    "descent as a rule, Meta-SGD": {"rule": lambda model: GradientDescent.meta_sgd(trained(model), 0.1)},
    "descent as a rule, LSLR": {"rule": lambda model: GradientDescent.lslr(trained(model), K, 0.1)},
    "descent as a rule, LSLR of more steps, checkpoints": {
        "rule": lambda model: GradientDescent.lslr(trained(model), K + 2, 0.1),
        "checkpoint_every": 2,
    },
    "a rule with a start": {"rule": lambda model: Inertia(start=model)},
    "a rule with a start, checkpoints": {"rule": lambda model: Inertia(start=model), "checkpoint_every": 2},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """An engine, a model for it, and why it does not serve some cases."""

    engine: Engine
    model: Callable[[], nn.Module]
    refuses: dict[str, str]


RULES = {name: "its steps are gradient descent, not those of " for name in CASES if name.startswith("a rule")}

ROWS = {
    "mlp": Row(
        MlpEngine(),
        mlp,
        {
            **RULES,
            "no step": "steps=0 takes the model as it is",
            "multi-step loss, learned weights": "step_weights is a tensor that requires a gradient",
            "support sets by step": "support_per_step brings another support set for each step",
            "support sets by step, masks": "support_per_step brings another support set for each step",
            "one task after another": "vectorize=False asks for it",
            "a rule, one task after another": "vectorize=False asks for it",
            "a rule, support sets by step": "support_per_step brings another support set for each step",
            "another loss": "the loss calls l1_loss",
            "plain PyTorch by name": "backend='reference' asks for it",
        },
    ),
    "generic": Row(GenericEngine(), lambda: seeded(Residual), {"C++ by name": "backend 'cpp' is another engine's"}),
    "generic, for an MLP": Row(GenericEngine(), mlp, {"C++ by name": "backend 'cpp' is another engine's"}),
}

every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def learned(shape: Any) -> Tensor:
    return (0.05 + 0.1 * drawn(*shape, seed=9).abs()).requires_grad_()


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def make_call(case: dict[str, Any], model: nn.Module, name: str = "meta_loss") -> Call:
    """The call of a case, with checked options."""
    given = dict(case)
    if given.pop("frozen", False):
        next(model.parameters()).requires_grad_(False)
    steps = given.get("steps", K)
    per_step = (steps,) if given.get("support_per_step") else ()
    masked, step_weights = given.pop("masks", False), given.pop("step_weights", None)
    shapes = {"support": (T, *per_step, S), "query": (T, Q)}
    sets, masks = {}, {}
    for seed, (part, shape) in enumerate(shapes.items()):
        kind = given.get("loss")
        y = labels(*shape, seed=seed) if kind is F.cross_entropy else drawn(*shape, 2, seed=seed + 2)
        sets[part] = drawn(*shape, 3, seed=seed), y.sigmoid() if kind is F.binary_cross_entropy_with_logits else y
        lengths = torch.tensor([shape[-1], 2, 3]).view(T, *[1] * (len(shape) - 1))
        masks[part] = (torch.arange(shape[-1]) < lengths).expand(shape) if masked else None
    for option in ("lr", "rule"):
        if callable(given.get(option)) and not isinstance(given[option], nn.Module):
            given[option] = given[option](model)
    if callable(step_weights):
        step_weights = step_weights(model)
    if isinstance(given.get("parameters"), list):  # name patterns for the models of all rows
        names = [n for n, _ in model.named_parameters()]
        given["parameters"] = [p for p in given["parameters"] if any(n.startswith(p[:-1]) for n in names)]
    if "rule" not in given and "lr" not in given:
        given["lr"] = 0.1
    options = LoopOptions(model, **{"steps": K, **given}).checked()
    query = None if name == "adapt" else sets["query"]
    return Call(name, options, sets["support"], query, (masks["support"], masks["query"]), step_weights)


def leaves_of(call: Call) -> dict[str, Tensor]:
    """All tensors that may receive a meta-gradient."""
    found = {f"model.{name}": p for name, p in trained(call.options.model)}
    if isinstance(call.options.rule, nn.Module):
        found |= {f"rule.{name}": p for name, p in call.options.rule.named_parameters()}
    lr = call.options.lr
    rates = lr if isinstance(lr, dict) else {"all": lr}
    found |= {f"lr.{name}": rate for name, rate in rates.items() if isinstance(rate, Tensor)}
    return found | ({"step_weights": call.step_weights} if isinstance(call.step_weights, Tensor) else {})


def meta_gradients(objective: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(objective, list(leaves.values()), allow_unused=True)
    grads = zip(leaves.items(), found, strict=True)
    return {name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in grads}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0, "a case without meta-gradients shows nothing"
    for name, want in expected.items():
        assert_close(
            f"meta-gradient of {name}", got[name], want, GRADIENTS * max(1.0, scale / float(want.abs().max() or scale))
        )


def is_served(row: Row, name: str, call: Call) -> bool:
    """Whether the engine serves the call; if not, checks that its reason is the row's."""
    reason = row.engine.serves(call)
    if name in row.refuses:
        assert reason is not None
        assert reason.startswith(row.refuses[name])
        return False
    assert reason is None
    return True


@every_row
@pytest.mark.parametrize("name", CASES)
def test_query_losses_and_meta_gradients(row: Row, name: str) -> None:
    call = make_call(CASES[name], row.model())
    if not is_served(row, name, call):
        return
    losses, (_, expected) = row.engine.meta_loss(call), by_hand(call)
    assert expected is not None
    assert_close("query losses", losses, expected, VALUES)
    weights, leaves = drawn(T, seed=7), leaves_of(call)
    got, want = (meta_gradients((weights * x).sum(), leaves) for x in (losses, expected))
    assert_same_gradients(got, want)


@every_row
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "step_weights" not in case])
def test_adapted_parameters_and_their_gradients(row: Row, name: str) -> None:
    call = make_call(CASES[name], row.model(), "adapt")
    if not is_served(row, name, call):
        return
    params, (expected, _) = row.engine.adapt(call), by_hand(call)
    assert list(params) == list(expected)
    for each, want in expected.items():
        assert_close(each, params[each], want, VALUES)
    leaves = leaves_of(call)
    objectives = [sum((p * drawn(*p.shape, seed=5)).sum() for p in x.values()) for x in (params, expected)]
    assert_same_gradients(*(meta_gradients(x, leaves) for x in objectives))


@every_row
@pytest.mark.parametrize("name", CASES)
def test_without_gradients_the_values_are_the_same(row: Row, name: str) -> None:
    call = make_call(CASES[name], row.model())
    if not is_served(row, name, call):
        return
    with torch.no_grad():
        again = make_call(CASES[name], row.model())
        assert row.engine.serves(again) is None
        losses = row.engine.meta_loss(again)
    assert not losses.requires_grad
    assert_close("query losses", losses, row.engine.meta_loss(call), VALUES)


@every_row
@pytest.mark.parametrize(("name", "weighted"), [("steps", False), *((name, True) for name in CASES)])
def test_its_own_way_back_is_that_of_autograd(row: Row, name: str, weighted: bool) -> None:
    call = make_call(CASES[name], row.model())
    if not is_served(row, name, call):
        return
    gradient = drawn(T, seed=7) if weighted else None
    leaves = {n: leaf for n, leaf in leaves_of(call).items() if n.startswith("model.")}
    losses = row.engine.meta_backward(call, gradient)
    if losses is None:  # the caller falls back to autograd; no state has changed
        assert all(leaf.grad is None for leaf in leaves.values())
        return
    assert not losses.requires_grad
    _, expected = by_hand(call)
    assert expected is not None
    assert_close("query losses", losses, expected, VALUES)
    weights = torch.full((T,), 1 / T, dtype=torch.float64) if gradient is None else gradient
    got = {n: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}
    assert_same_gradients(got, meta_gradients((weights * expected).sum(), leaves))


@every_row
def test_the_same_call_has_the_same_bits(row: Row) -> None:
    losses, grads = [], []
    for _ in range(3):  # engines' caches change nothing
        call = make_call(CASES["steps"], row.model())
        assert row.engine.serves(call) is None
        losses.append(row.engine.meta_loss(call))
        grads.append(torch.cat([g.flatten() for g in meta_gradients(losses[-1].sum(), leaves_of(call)).values()]))
    assert all(torch.equal(x, losses[0]) for x in losses)
    assert all(torch.equal(x, grads[0]) for x in grads)


@every_row
def test_an_engine_leaves_what_it_is_given(row: Row) -> None:
    call = make_call(CASES["checkpoints, masks, multi-step loss"], row.model())
    before = copy.deepcopy((call.options.model.state_dict(), call.support, call.query, call.masks))
    assert row.engine.serves(call) is None
    row.engine.meta_loss(call).sum().backward()
    after = call.options.model.state_dict(), call.support, call.query, call.masks
    assert torch.utils._pytree.tree_all(lambda same: same, torch.utils._pytree.tree_map(torch.equal, before, after))


def test_every_option_is_in_a_case() -> None:
    """Except those that change no value: explain and the model itself."""
    options = {option for case in CASES.values() for option in case} - {"masks", "step_weights", "frozen"}
    assert options == set(LoopOptions._fields) - {"model", "explain"}


def test_the_rows_are_all_engines() -> None:
    assert {type(row.engine) for row in ROWS.values()} == {type(engine) for engine in ENGINES}


@pytest.mark.parametrize("name", CASES)
def test_the_first_engine_that_serves_is_taken(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = {**CASES[name], "explain": True}
    call, names = make_call(case, mlp()), []
    serve(call, lambda engine: names.append(engine.name) or engine.meta_loss(call))
    refusal = ROWS["mlp"].refuses.get(name)
    line = capsys.readouterr().out
    assert names == [MlpEngine.name if refusal is None else GenericEngine.name]
    assert line.startswith("meta_loss: ")
    assert names[0] in line
    assert refusal is None or refusal in line


def test_what_no_engine_serves_is_said_with_the_reason() -> None:
    call = make_call({"backend": "cpp", "loss": F.l1_loss}, mlp())
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: the loss calls l1_loss"):
        serve(call, lambda engine: engine.meta_loss(call))


def test_an_engine_may_give_up_for_what_its_run_brings_to_light() -> None:
    model = mlp()
    call = make_call({"loss": F.cross_entropy}, model)
    call.query[1][0, 0] = -100  # which the loss ignores
    engine = MlpEngine()
    assert engine.serves(call) is None
    with pytest.raises(Unserved):
        engine.meta_loss(call)
    losses = serve(call, lambda each: each.meta_loss(call))
    assert_close("query losses", losses, by_hand(call)[1], VALUES)  # type: ignore[arg-type]
