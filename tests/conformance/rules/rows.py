"""All rules, one row each, with the formula to test them against.

Axis legend: T tasks, ``*shape`` the shape of one parameter tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from metakern.rules import (
    Adam,
    CoordinatewiseLSTM,
    GradientDescent,
    GuidedAdam,
    HierarchicalRNN,
    MetaLSTM,
    Momentum,
    PerParameterMLP,
    RNNProp,
    Rule,
)
from tests.conformance.rules.added_rule import NormalisedLSTM
from tests.rules import hrnn_formula, mlp_formula
from tests.rules.guided_formula import guided_adam

Tensors = dict[str, Tensor]

#: Parameters of one task.
SHAPES = {"weight": (3, 2), "bias": (3,), "scale": ()}

#: The same without a number, for rules that need an axis.
RANKED = {"weight": (3, 2), "bias": (3,), "scale": (1,)}


@dataclass(frozen=True)
class Row:
    """A rule.

    Attributes:
        name: its test name
        make: builds the rule for parameters of one task, with weights from torch's generator
        formula: one step in plain PyTorch: (rule, its weights by name, params, grads, memory, step, tasks) gives new
            params; ``memory`` is a dict that starts empty
        optimizer: the equal optimizer of torch, if there is one
        spreads: how far a non-finite gradient spreads: "coordinate" or "task"
        shapes: of the parameters of one task
        compiled: whether to test it compiled, which takes a second: once per code path
    """

    name: str
    make: Callable[[Mapping[str, Tensor]], Rule]
    formula: Callable[[Any, Tensors, Tensors, Tensors, dict[str, Any], int, bool], Tensors]
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    spreads: str = "coordinate"
    compiled: bool = True
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: SHAPES)

    def __str__(self) -> str:
        return self.name


def learned(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value))


def descent(rate: Callable[[Any, Tensors, str, int], Any]) -> Any:
    def step(rule: Any, w: Tensors, params: Tensors, grads: Tensors, memory: Any, step: int, tasks: bool) -> Tensors:
        return {name: p - rate(rule, w, name, step) * grads[name] for name, p in params.items()}

    return step


def clipped(
    rule: Any, w: Tensors, params: Tensors, grads: Tensors, memory: dict[str, Any], step: int, tasks: bool
) -> Tensors:
    if not tasks:
        one = ({name: x.unsqueeze(0) for name, x in xs.items()} for xs in (params, grads))
        return {name: p[0] for name, p in clipped(rule, w, *one, memory, step, True).items()}
    norm = (
        torch.stack([g.flatten(1).square().sum(1) if g.dim() > 1 else g.square() for g in grads.values()]).sum(0).sqrt()
    )
    factor = torch.where(norm > rule.clip_norm, rule.clip_norm / norm, 1.0)
    return {n: p - rule.lr * factor.view(-1, *[1] * (p.dim() - 1)) * grads[n] for n, p in params.items()}


def momentum(
    rule: Any, w: Tensors, params: Tensors, grads: Tensors, memory: dict[str, Any], step: int, tasks: bool
) -> Tensors:
    lr, mu, new = w.get("lr", rule.lr), w.get("momentum", rule.momentum), {}
    for name, p in params.items():
        memory[name] = v = mu * memory.get(name, 0) + grads[name]
        new[name] = p - lr * (grads[name] + mu * v if rule.nesterov else v)
    return new


def adam(
    rule: Any, w: Tensors, params: Tensors, grads: Tensors, memory: dict[str, Any], step: int, tasks: bool
) -> Tensors:
    lr, b1, b2, eps = (w.get(name, getattr(rule, name)) for name in ("lr", "beta1", "beta2", "eps"))
    new = {}
    for name, p in params.items():
        m, v = memory.get(name, (0, 0))
        m, v = b1 * m + (1 - b1) * grads[name], b2 * v + (1 - b2) * grads[name] ** 2
        memory[name] = m, v
        # The smallest number keeps the root's derivative finite and changes nothing else.
        root = ((v + 1e-300) / (1 - b2 ** (step + 1))).sqrt()
        new[name] = p - lr * m / (1 - b1 ** (step + 1)) / (root + eps)
    return new


def lstm(
    rule: Any, w: Tensors, params: Tensors, grads: Tensors, memory: dict[str, Any], step: int, tasks: bool
) -> Tensors:
    """The LSTM cells as a user would write them."""
    plain = rule.plain().double()
    cells = {}
    for name, weight in w.items():
        part, kind = name.split(".")
        cells[name if part == "head" else f"cells.{kind[-1]}.{kind[:-3]}"] = weight
    state = memory.get("state")
    new, memory["state"] = functional_call(
        plain, cells, (params, grads, plain.init_state(params) if state is None else state)
    )
    return new


def normalised_lstm(
    rule: Any, w: Tensors, params: Tensors, grads: Tensors, memory: dict[str, Any], step: int, tasks: bool
) -> Tensors:
    scaled = {}
    for name, g in grads.items():
        memory[name] = v = rule.decay * memory.get(name, 0) + (1 - rule.decay) * g * g
        scaled[name] = g / (v + 1e-8).sqrt()
    return lstm(rule, w, params, scaled, memory, step, tasks)


def cells(w: Tensors, x: Tensor, layers: list[tuple[Tensor, Tensor]] | None, hidden: int) -> Any:
    """Stacked LSTM cells by their formula, for x [..., F]; returns the top h and every layer's (h, c)."""
    zero = x.new_zeros(*x.shape[:-1], hidden)
    new = []
    for index, (h, c) in enumerate(layers or [(zero, zero)] * sum("weight_ih" in name for name in w)):
        ih, hh, b_ih, b_hh = (w[f"lstm.{n}_l{index}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        i, f, g, o = (x @ ih.T + h @ hh.T + b_ih + b_hh).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        x = o.sigmoid() * c.tanh()
        new.append((x, c))
    return x, new


def rnnprop(
    rule: Any, w: Tensors, params: Tensors, grads: Tensors, memory: dict[str, Any], step: int, tasks: bool
) -> Tensors:
    new = {}
    for name, p in params.items():
        g, (m, v, layers) = grads[name], memory.get(name, (0, 0, None))
        m, v = rule.beta1 * m + (1 - rule.beta1) * g, rule.beta2 * v + (1 - rule.beta2) * g**2
        root = ((v + 1e-300) / (1 - rule.beta2 ** (step + 1))).sqrt() + 1e-8  # the smallest number: see adam
        inputs = [g / root, m / (1 - rule.beta1 ** (step + 1)) / root]
        x = torch.stack(inputs[::-1] if rule.moment_first else inputs, -1)
        x = F.elu(x @ w["inputs.weight"].T + w["inputs.bias"])
        h, layers = cells(w, x, layers, rule.hidden_size)
        memory[name] = m, v, layers
        new[name] = p + rule.output_scale * torch.tanh(h @ w["head.weight"][0] + w["head.bias"][0])
    return new


def log_sign(x: Tensor, p: float) -> list[Tensor]:
    large = x.abs() >= math.exp(-p)
    size = torch.where(large, x.abs(), 1.0)
    return [torch.where(large, size.log() / p, -1.0), torch.where(large, x.sign(), math.exp(p) * x)]


def meta_lstm(
    rule: Any, w: Tensors, params: Tensors, grads: Tensors, memory: dict[str, Any], step: int, tasks: bool
) -> Tensors:
    losses, new = loss_at(params, tasks), {}
    for name, p in params.items():
        g, (f, i, layers) = grads[name] / rule.gradient_divisor, memory.get(name, (0 * p, 0 * p, None))
        loss = (losses.view(-1, *[1] * (p.dim() - 1)) if tasks else losses).expand(p.shape)
        inputs = [*log_sign(loss, rule.preprocess_scale), *log_sign(g, rule.preprocess_scale)]
        h, layers = cells(w, torch.stack(inputs, -1), layers, rule.hidden_size)
        gates = [
            torch.cat([h, p[..., None], gate[..., None]], -1) @ w["head.weight"][k] + w["head.bias"][k]
            for k, gate in enumerate((f, i))
        ]
        memory[name] = (*gates, layers)
        new[name] = gates[0].sigmoid() * p - gates[1].sigmoid() * g
    return new


def hierarchical_rnn(
    rule: Any, w: Tensors, params: Tensors, grads: Tensors, memory: dict[Any, Any], step: int, tasks: bool
) -> Tensors:
    shapes = {name: p.shape[1:] if tasks else p.shape for name, p in params.items()}
    rates = hrnn_formula.log_rates(rule, shapes)
    new = []
    for task in range(len(next(iter(params.values()))) if tasks else 1):
        own = [{n: (x[task] if tasks else x).reshape(-1) for n, x in xs.items()} for xs in (params, grads)]
        sizes = {name: p.numel() for name, p in own[0].items()}
        before = memory.get(task) or hrnn_formula.fresh(w, sizes, rates)
        flat, memory[task] = hrnn_formula.step(w, *own, before)
        new.append({name: p.view(shapes[name]) for name, p in flat.items()})
    return {name: torch.stack([each[name] for each in new]) if tasks else new[0][name] for name in params}


def per_parameter_mlp(
    rule: Any, w: Tensors, params: Tensors, grads: Tensors, memory: dict[str, Any], step: int, tasks: bool
) -> Tensors:
    new = {}
    for name, p in params.items():
        of_tasks = zip(p, grads[name], strict=True) if tasks else [(p, grads[name])]
        moved = []
        for task, (theta, g) in enumerate(of_tasks):
            at, memory[name, task] = mlp_formula.step(rule, w, theta, g, memory.get((name, task)), step)
            moved.append(at)
        new[name] = torch.stack(moved) if tasks else moved[0]
    return new


def drawn(rule: Rule) -> Rule:
    """The rule with all its weights moved, so that every one of them matters."""
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return rule


ROWS = [
    Row(
        "SGD",
        lambda _: GradientDescent(0.1),
        descent(lambda rule, w, name, step: rule.lr),
        lambda params: torch.optim.SGD(params, 0.1),
    ),
    Row(
        "SGD, learned",
        lambda _: GradientDescent(learned(0.1)),
        descent(lambda rule, w, name, step: w["lr"]),
        compiled=False,
    ),
    Row(
        "SGD by name",
        lambda _: GradientDescent({"bias": learned(0.3), "*": learned(0.1)}),
        descent(lambda rule, w, name, step: w["rates.bias" if name == "bias" else "rates.*"]),
    ),
    Row("SGD, clipped", lambda _: GradientDescent(0.1, clip_norm=1.5), clipped, spreads="task"),
    Row(
        "Meta-SGD",
        lambda params: GradientDescent.meta_sgd(params, 0.1),
        descent(lambda rule, w, name, step: w[f"rates.{name}"]),
        compiled=False,
    ),
    Row(
        "LSLR",
        lambda params: GradientDescent.lslr(params, 8, 0.1),
        descent(lambda rule, w, name, step: w[f"rates.{name}"][step]),
    ),
    Row(
        "momentum",
        lambda _: Momentum(0.1),
        momentum,
        lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
        compiled=False,
    ),
    Row(
        "Nesterov",
        lambda _: Momentum(0.1, 0.8, nesterov=True),
        momentum,
        lambda params: torch.optim.SGD(params, 0.1, momentum=0.8, nesterov=True),
    ),
    Row("momentum, learned", lambda _: Momentum(learned(0.1), learned(0.9)), momentum, compiled=False),
    Row("Adam", lambda _: Adam(0.1), adam, lambda params: torch.optim.Adam(params, 0.1), compiled=False),
    Row("Adam, learned", lambda _: Adam(*map(learned, (0.1, 0.9, 0.99, 1e-3))), adam),
    Row("Guided Adam", lambda _: drawn(GuidedAdam(5, total_steps=4)), guided_adam, spreads="task"),
    Row("LSTM", lambda _: CoordinatewiseLSTM(6, 2, output_scale=1.0), lstm),
    Row("LSTM on plain gradients", lambda _: CoordinatewiseLSTM(5, 1, "none"), lstm, compiled=False),
    Row("RNNProp", lambda _: RNNProp(6, 2), rnnprop),
    Row(
        "RNNProp, the other code",
        lambda _: RNNProp(5, 1, 0.9, 0.99, 0.01, moment_first=True),
        rnnprop,
        compiled=False,
    ),
    Row("Meta-LSTM", lambda _: large(MetaLSTM(hidden_size=6)), meta_lstm),
    Row("Meta-LSTM, with a start", lambda p: MetaLSTM(p, 5, 2, 7.0, 3.0), meta_lstm, compiled=False),
    Row("hierarchical RNN", lambda _: HierarchicalRNN(), hierarchical_rnn, spreads="task"),
    Row(
        "hierarchical RNN with attention",
        lambda _: HierarchicalRNN(7, 5, 3, attention=True, backend="reference"),
        hierarchical_rnn,
        spreads="task",
        compiled=False,
    ),
    Row(
        "per-parameter MLP",
        lambda _: PerParameterMLP.mulo(5, weight_decay=0.1, width_multiplier=2.0, step_mult=0.3, backend="reference"),
        per_parameter_mlp,
        spreads="task",
        shapes=RANKED,
    ),
    Row(
        "per-parameter MLP with learned decays",
        lambda _: PerParameterMLP.elo(4, 1, learned_decays=True, weight_decay=0.1, backend="reference"),
        per_parameter_mlp,
        spreads="task",
        compiled=False,
        shapes=RANKED,
    ),
    Row("normalised LSTM", lambda _: NormalisedLSTM(5, 2, "none"), normalised_lstm),
]


def large(rule: Any) -> Any:
    """The rule with weights that matter."""
    with torch.no_grad():
        for weight in rule.parameters():
            weight.uniform_(-0.5, 0.5)
    return rule


def has_rates(rule: Any) -> bool:
    """Whether it has learned rates by name or step, which have their parameters' dtype."""
    return hasattr(rule, "rates") and bool(list(rule.rates.parameters()))


def make_params(row: Row, num_tasks: int | None, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """Params by name, [T, *shape] each, or [*shape] without tasks."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if num_tasks is None else (num_tasks,)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    return {name: torch.randn((*lead, *shape), **options).to(dtype) for name, shape in row.shapes.items()}


def make_rule(row: Row, dtype: torch.dtype = torch.float32) -> Any:
    """The rule for the row's shapes; the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rule = row.make({name: torch.zeros(shape) for name, shape in row.shapes.items()})
    return rule.to(dtype)


def run(rule: Any, params: Any, steps: int, *, tasks: bool, state: Any = None, first: int = 0) -> tuple[Any, Any]:
    """Several steps along gradients that depend only on the step; returns params and state."""
    state = rule.init_state(params, tasks=tasks) if state is None else state
    for step in range(first, first + steps):
        params, state = rule(params, grads_at(params, step), state, **given(rule, params, tasks))
    return params, state


def grads_at(params: Any, step: int) -> Any:
    """A gradient for every parameter; a task's gradients do not depend on the other tasks."""
    return {name: torch.sin(3 * p.detach() + step) for name, p in params.items()}


def loss_at(params: Any, tasks: bool) -> Tensor:
    """Losses [T] of params, or [] without tasks; a task's loss does not depend on the other tasks."""
    leaves = [p.cos() for p in pytree.tree_leaves(params) if p.numel()]
    return sum((p.flatten(1).sum(1) if p.dim() > 1 else p) if tasks else p.sum() for p in leaves) + torch.zeros(())


def given(rule: Any, params: Any, tasks: bool) -> dict[str, Tensor]:
    """The argument ``loss`` of a step, if the rule needs it."""
    return {"loss": loss_at(params, tasks)} if rule.needs_loss else {}
