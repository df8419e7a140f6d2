"""Tensors on several devices are refused: one on "meta" would lead to uninitialised results."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from metakern.ops import LSTMState, inner_update, lstm_step, lstm_step_, mlp_inner_loop, mlp_meta_loss

OPS: Any = torch.ops.metakern
BACKENDS = ("cpp", "reference")


def params() -> list[Tensor]:
    return [torch.randn(4, 2), torch.randn(4), torch.randn(1, 4), torch.randn(1)]


def samples(count: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, count, 2), torch.randn(3, count, 1), torch.ones(3, count, dtype=torch.bool)


def adapted(a: dict[str, Any], backend: str) -> Any:
    options = {"lr": a["lr"], "steps": 2, "support_mask": a["support_mask"], "backend": backend}
    return mlp_inner_loop(a["params"], a["support_x"], a["support_y"], **options)


def losses(a: dict[str, Any], backend: str) -> Any:
    masks = {name: a[name] for name in ("support_mask", "query_mask")}
    support, query = (a["support_x"], a["support_y"]), (a["query_x"], a["query_y"])
    return mlp_meta_loss(a["params"], support, query, lr=a["lr"], steps=2, backend=backend, **masks)


def updated(a: dict[str, Any], backend: str) -> Any:
    return inner_update(a["params"], a["grads"], a["lr"], active=a["active"], backend=backend)


def stepped(a: dict[str, Any], backend: str, function: Callable[..., Any] = lstm_step) -> Any:
    return function(a["params"], a["grads"], LSTMState(a["state"], 40), a["weights"], backend=backend)


def raw_step(a: dict[str, Any], backend: str) -> Any:
    return OPS.lstm_step(a["params"], a["grads"], a["state"], a["weights"], 1, 10.0, 0.1, 0)


def raw_step_(a: dict[str, Any], backend: str) -> Any:
    return OPS.lstm_step_(a["params"], a["grads"], a["state"], a["weights"], 1, 10.0, 0.1, 0)


def raw_step_backward(a: dict[str, Any], backend: str) -> Any:
    gradients = a["grad_new_params"], a["grad_new_state"]
    return OPS.lstm_step_backward(*gradients, a["grads"], a["state"], a["weights"], 1, 10.0, 0.1, 0)


def raw_update(a: dict[str, Any], backend: str) -> Any:
    return OPS.inner_update(a["params"], a["grads"], a["lr"], 0.0, -1, None, a["active"])


def of_lstm(*more: str) -> dict[str, Any]:
    weights = [torch.randn(s) for s in ((16, 2), (16, 4), (16,), (16,), (1, 4), (1,))]
    found = {"params": torch.randn(40), "grads": torch.randn(40), "state": torch.zeros(2, 1, 2, 4, 32)}
    found |= {name: torch.zeros_like(found[name.removeprefix("grad_new_")]) for name in more}
    found |= {"weights": weights}
    return {name: x for name, x in found.items() if name != "params" or not more}  # which the way back does not need


def of_update() -> dict[str, Any]:
    lists = {"params": [torch.randn(3, 2), torch.randn(3)], "grads": [torch.randn(3, 2), torch.randn(3)]}
    return {**lists, "lr": [torch.tensor(0.1), torch.tensor(0.1)], "active": torch.ones(3, dtype=torch.bool)}


def of_mlp(*names: str) -> dict[str, Any]:
    found: dict[str, Any] = {"params": params(), "lr": [torch.tensor(0.1)] * 4}
    for name in names:
        parts = zip(("x", "y", "mask"), samples(4), strict=True)
        found |= {f"{name}_{part}": tensor for part, tensor in parts}
    return found


#: Calls, and their arguments.
CALLS: dict[str, tuple[Callable[[dict[str, Any], str], Any], Callable[[], dict[str, Any]]]] = {
    "mlp_inner_loop": (adapted, lambda: of_mlp("support")),
    "mlp_meta_loss": (losses, lambda: of_mlp("support", "query")),
    "inner_update": (updated, of_update),
    "lstm_step": (stepped, of_lstm),
    "lstm_step_": (lambda a, backend: stepped(a, backend, lstm_step_), of_lstm),
    "raw lstm_step": (raw_step, of_lstm),
    "raw lstm_step_": (raw_step_, of_lstm),
    "raw lstm_step_backward": (raw_step_backward, lambda: of_lstm("grad_new_params", "grad_new_state")),
    "raw inner_update": (raw_update, of_update),
}


def moved(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """With the last tensor of one argument on another device."""
    value = arguments[name]
    value = [*value[:-1], value[-1].to("meta")] if isinstance(value, list) else value.to("meta")
    return {**arguments, name: value}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_every_argument_must_be_where_the_others_are(name: str, backend: str) -> None:
    call, make = CALLS[name]
    call(make(), backend)
    for argument in make():
        with pytest.raises(RuntimeError) as caught:
            call(moved(make(), argument), backend)
        said = str(caught.value)
        assert re.search(r"\bmeta\b", said), f"{argument}: {said}"
        assert re.search(r"\bcpu\b", said), f"{argument}: {said}"
        names = {"params": "params|grads|state", "state": "state"}.get(argument, argument)
        assert re.search(names, said), f"{argument}: {said}"


@pytest.mark.parametrize("name", ["mlp_inner_loop", "mlp_meta_loss"])
def test_raw_operators_of_inner_loops(name: str) -> None:
    """Every tensor of the operator and its way back, second_order and step_weights among them."""
    for operator in (name, f"{name}_backward"):
        call, arguments = raw(operator)
        call(*arguments)
        for index, value in enumerate(arguments):
            if isinstance(value, Tensor):
                changed: Any = value.to("meta")
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                changed = [*value[:-1], value[-1].to("meta")]
            else:
                continue
            with pytest.raises(RuntimeError, match=r"must be on .*(cpu, got meta|meta, got cpu)"):
                call(*arguments[:index], changed, *arguments[index + 1 :])


def raw(name: str) -> tuple[Callable[..., Any], list[Any]]:
    """An operator, and arguments in the order of its schema."""
    operator = getattr(OPS, name).default
    second_order, weights = torch.ones(2, dtype=torch.bool), torch.tensor([0.5, 1.0])
    (x, y, mask), (query_x, query_y, query_mask) = samples(4), samples(5)
    known: dict[str, Any] = {
        **{"params": params(), "lr": [torch.tensor(0.1)] * 4, "rate": 0.0, "steps": 2, "per_step": False},
        **{"adapted": -1, "activation": 0, "loss": 0, "checkpoint_every": 1, "second_order": second_order},
        **{"x": x, "y": y, "mask": mask, "query_x": query_x, "query_y": query_y, "query_mask": query_mask},
        **{"step_weights": weights, "weights": weights, "slopes": [], "clip_norm": None},
    }
    forward = getattr(OPS, name.removesuffix("_backward")).default
    flags = {a.name: True for a in forward._schema.arguments if a.name not in known}
    if name.endswith("_backward"):
        results, kept = forward(*(({**known, **flags})[a.name] for a in forward._schema.arguments))
        first, second = (a.name for a in operator._schema.arguments[:2])
        known |= {first: list(results) if isinstance(results, (list, tuple)) else results, second: kept}
        return operator, [known[a.name] for a in operator._schema.arguments]
    return operator, [({**known, **flags})[a.name] for a in operator._schema.arguments]


def test_meta_tensors_alone_give_meta_results() -> None:
    arguments = {
        name: [x.to("meta") for x in value] if isinstance(value, list) else value.to("meta")
        for name, value in of_lstm().items()
    }
    new, state = raw_step(arguments, "cpp")
    assert new.is_meta
    assert state.is_meta
