"""Meta-LSTM: Ravi & Larochelle 2017, "Optimization as a model for few-shot learning" (ICLR)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from metakern.core.checks import is_number
from metakern.ops.lstm_step import check_scales
from metakern.rules.staged_rule import StagedRule


class MetaLSTM(StagedRule):
    """A parameter as the cell of an LSTM: θ' = σ(f) ⊙ θ − σ(i) ⊙ g, with gates f and i from a small LSTM.

    The LSTM, shared by all coordinates, reads the loss of the coordinate's task and the gradient, both preprocessed by
    ``"log_sign"``. f and i are linear in its h, in θ and in their own value before; that value, before the sigmoid, is
    fed back, and starts at 0. All weights start from U(±0.01), the biases from U(4, 5) for f and U(−5, −4) for i, so
    that the first steps are those of gradient descent.

    Every step needs the losses: ``rule(params, grads, state, loss=losses)``. ``adapt``, ``meta_loss``, ``RuleLearner``
    and ``LearnedOptimizer.step(closure)`` pass them.

    The rule also learns the parameters that every task starts from if it gets initial values for them:
    ``MetaLSTM.for_model(model)`` takes the model's. ``adapt``, ``meta_loss``, ``meta_backward`` and ``RuleLearner``
    then start there, and their meta-gradients flow to the rule's values in place of the model's. For
    ``LearnedOptimizer``, load them: ``model.load_state_dict(rule.initialisation(), strict=False)``.

    Args:
        initial: parameters [*shape] by name to learn as the tasks' start; None learns no start.
        hidden_size: H, 1 to 64.
        num_layers: L, 1 to 3.
        preprocess_scale: p of the preprocessing.
        gradient_divisor: divides every gradient first. The authors divide the gradient of the mean loss by the batch
            size again: pass that size to do as they do.
        backend: ``"auto"``, ``"cpp"``, ``"cuda"`` or ``"reference"``; None is ``"auto"``.
        precision: of the products, as for :class:`metakern.rules.CoordinatewiseLSTM`.
        horizon: steps that the rule was meta-trained for, or None.
        trained_on: description of the meta-training tasks, or None.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Example:
        >>> rule = MetaLSTM.for_model(net)
        >>> sets = (support_x, support_y), (query_x, query_y)
        >>> meta_loss(net, *sets, loss=F.cross_entropy, steps=5, rule=rule).mean().backward()
    """

    title: ClassVar[str] = "Meta-LSTM"
    needs_loss: ClassVar[bool] = True
    takes_copies: ClassVar[bool] = True
    features: ClassVar[str] = "log_sign_with_loss"
    head_stage: ClassVar[str] = "gates"
    kept: ClassVar[str] = "gates"

    def __init__(
        self,
        initial: Mapping[str, Tensor] | None = None,
        hidden_size: int = 20,
        num_layers: int = 1,
        preprocess_scale: float = 10.0,
        gradient_divisor: float = 1.0,
        backend: str | None = None,
        *,
        precision: str = "highest",
        horizon: int | None = None,
        trained_on: str | None = None,
    ) -> None:
        head = (hidden_size + 2, 2)
        super().__init__(hidden_size, num_layers, backend, precision, horizon, trained_on, inputs=4, head=head)
        check_scales(preprocess_scale, 1.0)
        if not is_number(gradient_divisor):
            raise TypeError(f"gradient_divisor must be a number, got {gradient_divisor!r}")
        if not 0 < gradient_divisor < math.inf:
            raise ValueError(f"gradient_divisor must be positive and finite, got {gradient_divisor}")
        self.preprocess_scale, self.gradient_divisor = float(preprocess_scale), float(gradient_divisor)
        with torch.no_grad():
            for weight in self.parameters():
                weight.uniform_(-0.01, 0.01)
            self.head.bias[0].uniform_(4, 5)
            self.head.bias[1].uniform_(-5, -4)
        self.initial = _Start({} if initial is None else initial)

    @classmethod
    def for_model(cls, model: nn.Module, **options: Any) -> Self:
        """A rule that learns the start of a model's parameters, from copies of those that require a gradient."""
        return cls({name: p for name, p in model.named_parameters() if p.requires_grad}, **options)

    def initialisation(self) -> dict[str, Tensor] | None:
        """The learned initial parameters, [*shape] each by name; None if the rule learns none."""
        return {name.replace("/", "."): p for name, p in self.initial.named_parameters()} or None

    def own_weights(self) -> list[Any]:
        """The cells' weights, the gates' for h, their biases, and as one [4] those for θ and the gate before."""
        *cells, matrix, bias = super().own_weights()
        return [*cells, matrix[..., : self.hidden_size], bias, matrix[..., self.hidden_size :].flatten(-2)]

    def stage_options(self) -> dict[str, Any]:
        """The preprocessing's scale."""
        return {"features_scale": self.preprocess_scale}

    def fed(self, grads: Tensor) -> Tensor:
        """The gradients divided by ``gradient_divisor``."""
        return grads if self.gradient_divisor == 1 else grads / self.gradient_divisor

    @classmethod
    def option_types(cls) -> dict[str, Any]:
        """The options in config.json; initial parameters are saved as weights."""
        return {name: kind for name, kind in super().option_types().items() if name != "initial"}

    @classmethod
    def from_saved(cls, options: dict[str, Any], weights: Mapping[str, Tensor]) -> Self:
        """A rule whose initial parameters have the names and shapes of the saved ones."""
        start = {n.removeprefix("initial."): w for n, w in weights.items() if n.startswith("initial.")}
        return cls({name.replace("/", "."): w for name, w in start.items()}, **options)

    def described(self) -> str:
        """Description for the model card."""
        start = ", and learned initial parameters" if self.initialisation() else ""
        return (
            "Meta-LSTM (Ravi & Larochelle 2017): every parameter is the cell of an LSTM, whose gates come from a small "
            f"LSTM shared by all coordinates, with {self.num_layers} x {self.hidden_size} units{start}."
        )


class _Start(nn.Module):
    """Learned initial parameters, whose names may hold dots."""

    def __init__(self, initial: Mapping[str, Tensor]) -> None:
        super().__init__()
        if not isinstance(initial, Mapping):
            raise TypeError(f"initial must be a dict of tensors by name, got {type(initial).__name__}")
        for name, p in initial.items():
            if not isinstance(p, Tensor) or not p.is_floating_point():
                got = f"{p.dtype}" if isinstance(p, Tensor) else type(p).__name__
                raise TypeError(f"initial[{name!r}] must be a floating tensor, got {got}")
            self.register_parameter(name.replace(".", "/"), nn.Parameter(p.detach().clone()))
