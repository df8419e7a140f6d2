"""MAML and its family as a meta-learner for the trainer: an initialisation, and learned rates where they are asked for.

Finn et al. 2017, arXiv 1703.03400; Meta-SGD: Li et al. 2017, arXiv 1707.09835; LSLR: Antoniou et al. 2019,
arXiv 1810.09502. Axis legend: T tasks, S support and Q query samples, K inner steps, P meta-parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern._inner_loop_input import adapted_names
from metakern.maml import Adapted, adapt, meta_loss, reptile_step
from metakern.tasks import Episodes

#: Which inner learning rates are learned: none, one for every tensor and step, one for every parameter.
RATES = ("fixed", "lslr", "meta_sgd")


class MAMLLearner(nn.Module):
    """A model whose initialisation is meta-learned.

    Args:
        model: any module; see :func:`metakern.adapt`
        loss: of one task, as for :func:`metakern.adapt`
        steps: K in training
        eval_steps: K in evaluation; default: ``steps``, which learned rates by step demand
        lr: α, where learned rates start
        rates: one of :data:`RATES`
        options: ``first_order``, ``parameters``, ``clip_norm``, ``checkpoint_every``, ``vectorize`` and ``backend`` of
            :func:`metakern.adapt`

    Raises:
        ValueError: for other ``rates``, and for ``eval_steps`` beyond the steps that rates are learned for.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[..., Tensor] = F.mse_loss,
        steps: int = 1,
        eval_steps: int | None = None,
        lr: float = 0.01,
        rates: str = "fixed",
        **options: Any,
    ) -> None:
        super().__init__()
        if rates not in RATES:
            raise ValueError(f"rates must be one of {', '.join(RATES)}, got {rates!r}")
        self.eval_steps = steps if eval_steps is None else eval_steps
        if rates == "lslr" and self.eval_steps != steps:
            raise ValueError(f"eval_steps must be steps, {steps}, as each step learns its rate, got {self.eval_steps}")
        self.model, self.loss, self.steps, self.lr, self.options = model, loss, steps, lr, options
        self._by_step = rates == "lslr"
        self.rates = nn.ParameterDict(_initial_rates(model, options.get("parameters"), rates, steps, lr))
        self._names = {name.replace(".", "/"): name for name, _ in model.named_parameters()}

    def meta_losses(self, batch: Episodes) -> Iterator[Tensor]:
        """Query losses [T] after K inner steps; one outer step a batch."""
        yield meta_loss(self.model, batch.support, batch.query, **self._arguments(self.steps))

    def adapt(self, batch: Episodes, steps: int | None = None) -> Adapted:
        """The T models after ``steps`` inner steps on their support sets, ``eval_steps`` by default."""
        return adapt(self.model, *batch.support, **self._arguments(self.eval_steps if steps is None else steps))

    def predict(self, batch: Episodes, steps: int | None = None) -> Tensor:
        """Predictions [T, Q, ...] for the query sets after ``steps`` steps; 0 steps leave the initialisation itself."""
        if steps == 0:
            return torch.stack([self.model(x) for x in batch.query_x])
        return self.adapt(batch, steps)(batch.query_x)

    @torch.no_grad()
    def evaluate(self, batch: Episodes) -> dict[str, Tensor]:
        """Query loss, and accuracy where targets are classes, of every task after ``eval_steps`` steps, [T] each."""
        return self.measure(self.predict(batch), batch.query_y)

    def measure(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss, and accuracy where targets are classes, of predictions [T, Q, ...] for targets; [T] each."""
        losses = torch.stack([self.loss(p, t) for p, t in zip(prediction, target, strict=True)])
        if target.is_floating_point():
            return {"loss": losses}
        return {"loss": losses, "accuracy": (prediction.argmax(2) == target).float().mean(1)}

    @torch.no_grad()
    def support_losses(self, batch: Episodes) -> Tensor:
        """Losses [T] on the support sets after ``eval_steps`` steps on them: query sets are not looked at."""
        return meta_loss(self.model, batch.support, batch.support, **self._arguments(self.eval_steps))

    @torch.no_grad()
    def displacements(self, batch: Episodes, steps: int | None = None) -> Tensor:
        """[T, P]: where ``steps`` inner steps, ``eval_steps`` by default, take the adapted parameters, from here."""
        return self._displacements(self.adapt(batch, steps))

    @torch.no_grad()
    def support_gradients(self, batch: Episodes) -> Tensor:
        """[T, P]: gradients of the support losses at the initialisation; no learned rate weighs them."""
        arguments = {**self._arguments(1), "lr": 1.0}
        return -self._displacements(adapt(self.model, *batch.support, **arguments))

    @torch.no_grad()
    def approach(self, batch: Episodes) -> None:
        """Move the initialisation to the mean of where the inner steps on ``batch`` lead from it (a Reptile step)."""
        reptile_step(self.model, self.adapt(batch), 1.0)

    def _displacements(self, adapted: Adapted) -> Tensor:
        start = dict(self.model.named_parameters())
        return torch.cat([(tensor - start[name]).flatten(1) for name, tensor in adapted.parameters.items()], 1)

    def _arguments(self, steps: int) -> dict[str, Any]:
        rates = {self._names[key]: rate[:steps] if self._by_step else rate for key, rate in self.rates.items()}
        return {"loss": self.loss, "steps": steps, "lr": rates or self.lr, **self.options}


def _initial_rates(model: nn.Module, parameters: Any, rates: str, steps: int, lr: float) -> dict[str, nn.Parameter]:
    """α as learned tensors by parameter name; a slash for every dot, which names of parameters cannot have."""
    if rates == "fixed":
        return {}
    named = dict(model.named_parameters())
    shapes = {n: (steps,) if rates == "lslr" else named[n].shape for n in adapted_names(model, parameters)}
    return {n.replace(".", "/"): nn.Parameter(torch.full(shape, float(lr))) for n, shape in shapes.items()}
