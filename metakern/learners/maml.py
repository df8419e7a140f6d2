"""MAML and its family as a meta-learner for the trainer: learns an initialisation and, optionally, learning rates.

Finn et al. 2017, arXiv 1703.03400; Meta-SGD: Li et al. 2017, arXiv 1707.09835; LSLR: Antoniou et al. 2019,
arXiv 1810.09502. Axis legend: T tasks, S support and Q query samples, K inner steps, P meta-parameters.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.core.checks import check_count, check_rate
from metakern.core.renamed import message, renamed
from metakern.core.trees import Data, class_scores, flatten, map_tensors
from metakern.core.warn import warn_user
from metakern.inner_loop.arguments import LoopOptions, adapted_names
from metakern.inner_loop.task_loss import TaskLoss, ignored_label
from metakern.maml.batched import Adapted, adapt, meta_loss, query_losses, reptile_step
from metakern.rules.rates import rates_by_name, real_dtype
from metakern.rules.registry import make
from metakern.tasks import Episodes

#: Learned inner rates: none, one per tensor and step, or one per parameter element.
RATES = ("fixed", "lslr", "meta_sgd")


@renamed(lr="inner_lr")
class MAMLLearner(nn.Module):
    """A model whose initialisation is meta-learned.

    Only :meth:`meta_losses` updates running statistics; evaluation, prediction and the methods that clusters need leave
    every buffer of the model as it is, also in ``train()`` mode.

    Args:
        model: any module; see :func:`metakern.adapt`
        loss: loss of one task, as for :func:`metakern.adapt`; for class labels pass one such as ``F.cross_entropy``
        steps: K in training; 0 trains the model as it is
        eval_steps: K in evaluation; default: ``steps``; "lslr" rates require that default
        inner_lr: α, the initial value of learned rates: a number, or numbers by name or glob pattern; fixed rates may
            be anything that ``lr`` of :func:`metakern.adapt` takes
        rates: one of :data:`RATES`; learned ones have the dtype and device of their parameters
        options: ``first_order``, ``parameters``, ``clip_norm``, ``checkpoint_every``, ``accumulate``,
            ``support_per_step``, ``vectorize`` and ``backend`` of :func:`metakern.adapt`. With ``support_per_step``
            the support sets of a batch are [T, K, S, ...], for at least as many steps as the call takes. With ``rule``
            that rule replaces gradient descent in the inner loop, and its weights are meta-parameters, too; the methods
            for clusters use the model's own parameters, even if the rule learns another initialisation. A rule may be
            given by its name, as for :func:`metakern.rules.make`: ``"adam"`` then learns its rate, ``"meta-sgd"`` those
            of the adapted parameters.

    Raises:
        TypeError, ValueError: for unknown ``rates``, for ``eval_steps`` other than the steps that rates are learned
            for, and for numbers out of range.

    Example:
        >>> learner = MAMLLearner(mlp(1, 40, 1), steps=5, inner_lr=0.01)
        >>> for losses in learner.meta_losses(Sinusoid().sample(32, generator)):
        ...     losses.mean().backward()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[..., Tensor] = F.mse_loss,
        steps: int = 1,
        eval_steps: int | None = None,
        inner_lr: Any = 0.01,
        rates: str = "fixed",
        **options: Any,
    ) -> None:
        super().__init__()
        if rates not in RATES:
            raise ValueError(f"rates must be one of {', '.join(RATES)}, got {rates!r}")
        steps = check_count("steps", steps, minimum=0)
        self.eval_steps = steps if eval_steps is None else check_count("eval_steps", eval_steps, minimum=0)
        if rates == "lslr" and self.eval_steps != steps:
            raise ValueError(f"eval_steps must be steps, {steps}, as each step learns its rate, got {self.eval_steps}")
        rule = options.pop("rule", None)
        if rule is not None:
            if rates != "fixed":
                raise ValueError(f"rates and rule exclude each other, got rates={rates!r} and {type(rule).__name__}")
            if isinstance(rule, str):
                params = dict(model.named_parameters())
                adapted = {name: params[name] for name in adapted_names(model, options.get("parameters"))}
                rule = make(rule, params=adapted, learned=True)
            if not isinstance(rule, nn.Module):
                raise TypeError(f"rule must be a rule or its name, got {type(rule).__name__}")
            self.rule = rule  # its weights are meta-parameters
        self.model, self.loss, self.steps, self.inner_lr, self.options = model, loss, steps, inner_lr, options
        self._by_step, self._kind = rates == "lslr", rates
        self.rates = nn.ParameterDict(_initial_rates(model, options.get("parameters"), rates, steps, inner_lr))
        self._names = {name.replace(".", "/"): name for name, _ in model.named_parameters()}

    def __repr__(self) -> str:
        number = sum(p.numel() for p in self.model.parameters())
        settings = f"steps={self.steps}, eval_steps={self.eval_steps}, rates={self._kind!r}"
        return f"MAMLLearner({type(self.model).__name__} of {number:,} parameters, {settings})"

    def meta_losses(self, batch: Episodes) -> Iterator[Tensor]:
        """Query losses [T] after K inner steps; one outer step per batch."""
        yield meta_loss(self.model, self._support(batch, self.steps), batch.query, **self._arguments(self.steps))

    def adapt_to(self, batch: Episodes, steps: int | None = None) -> Adapted:
        """The T models after ``steps`` inner steps on their support sets, ``eval_steps`` by default."""
        steps = self.eval_steps if steps is None else steps
        return adapt(self.model, self._support(batch, steps), **self._arguments(steps))

    def adapt(self, batch: Episodes, steps: int | None = None) -> Adapted:
        """The old name of :meth:`adapt_to`."""
        warn_user(message("MAMLLearner.adapt", "adapt_to"), DeprecationWarning)
        return self.adapt_to(batch, steps)

    def predict(self, batch: Episodes, steps: int | None = None) -> Any:
        """Predictions for the query sets after ``steps`` inner steps; 0 steps use the initialisation itself.

        Returns the model's outputs, with tensors [T, Q, ...].
        """
        return self.adapt_to(batch, steps)(batch.query_x)

    @torch.no_grad()
    def evaluate(self, batch: Episodes) -> dict[str, Tensor]:
        """Query loss, and accuracy where targets are classes, of every task after ``eval_steps`` steps, [T] each."""
        return self.measure(self.predict(batch), batch.query_y)

    def measure(self, prediction: Any, target: Data | None) -> dict[str, Tensor]:
        """Loss, and accuracy where targets are classes, of predictions for targets [T, Q, ...]; [T] each.

        Predictions are what :meth:`predict` returns. Accuracy needs class scores: a prediction that is a tensor or has
        ``logits``; other structures give the loss alone. Labels that the loss ignores do not count.
        """
        loss, (tensors, rebuild) = TaskLoss(self.loss, False), flatten(prediction)
        losses = []
        for task in range(len(tensors[0])):
            of_task = rebuild([tensor[task] for tensor in tensors])
            losses.append(loss(of_task, map_tensors(operator.itemgetter(task), target)))
        measures, scores = {"loss": torch.stack(losses)}, class_scores(prediction)
        if not isinstance(target, Tensor) or target.is_floating_point() or scores is None or scores.dim() < 3:
            return measures
        counted, ignored = torch.ones_like(target, dtype=torch.bool), ignored_label(self.loss)
        if ignored is not None:
            counted = target != ignored
        hits = (scores.argmax(2) == target) & counted
        return measures | {"accuracy": hits.flatten(1).sum(1).float() / counted.flatten(1).sum(1)}

    @torch.no_grad()
    def support_losses(self, batch: Episodes) -> Tensor:
        """Losses [T] on the support sets after ``eval_steps`` inner steps on them; query sets are not used."""
        options = LoopOptions(self.model, **self._arguments(self.eval_steps))
        support = self._support(batch, self.eval_steps)
        return query_losses(options, support, self._whole_support(batch), moves_statistics=False)

    @torch.no_grad()
    def displacements(self, batch: Episodes, steps: int | None = None) -> Tensor:
        """Displacements [T, P] of the adapted parameters by ``steps`` inner steps, ``eval_steps`` by default."""
        return self._displacements(self.adapt_to(batch, steps))

    @torch.no_grad()
    def support_gradients(self, batch: Episodes) -> Tensor:
        """Gradients [T, P] of the support losses at the initialisation, without learning rates."""
        arguments = {**self._arguments(1), "rule": None, "lr": 1.0, "support_per_step": False}
        return -self._displacements(adapt(self.model, self._whole_support(batch), **arguments))

    @torch.no_grad()
    def approach(self, batch: Episodes) -> None:
        """Move the initialisation to the mean of the adapted parameters for ``batch`` (a Reptile step with ε = 1)."""
        reptile_step(self.model, self.adapt_to(batch), 1.0)

    def _displacements(self, adapted: Adapted) -> Tensor:
        start = dict(self.model.named_parameters())
        return torch.cat([(tensor - start[name]).flatten(1) for name, tensor in adapted.parameters.items()], 1)

    def _support(self, batch: Episodes, steps: int) -> tuple[Data, Data | None]:
        """The support sets for ``steps`` inner steps; with ``support_per_step``, those of the first steps."""
        if not self.options.get("support_per_step", False):
            return batch.support
        x, y = (map_tensors(lambda tensor: tensor[:, :steps], part) for part in batch.support)
        return x, y

    def _whole_support(self, batch: Episodes) -> tuple[Data, Data | None]:
        """All support samples of a task as one set."""
        if not self.options.get("support_per_step", False):
            return batch.support
        x, y = (map_tensors(lambda tensor: tensor.flatten(1, 2), part) for part in batch.support)
        return x, y

    def _arguments(self, steps: int) -> dict[str, Any]:
        rates = {self._names[key]: rate[:steps] if self._by_step else rate for key, rate in self.rates.items()}
        update = {"rule": self.rule} if "rule" in self._modules else {"lr": rates or self.inner_lr}
        return {"loss": self.loss, "steps": steps, **update, **self.options}


def _initial_rates(model: nn.Module, parameters: Any, rates: str, steps: int, lr: Any) -> dict[str, nn.Parameter]:
    """Learned α by parameter name, with dots replaced by slashes: ParameterDict keys cannot contain dots."""
    if rates == "fixed":
        return {}
    named, names = dict(model.named_parameters()), adapted_names(model, parameters)
    starts = rates_by_name(lr, names) if isinstance(lr, Mapping) else dict.fromkeys(names, lr)
    learned = {}
    for name, start in starts.items():
        check_rate("inner_lr", start)
        p = named[name]
        shape = (steps,) if rates == "lslr" else p.shape
        rate = torch.full(shape, float(start), dtype=real_dtype(p), device=p.device)
        learned[name.replace(".", "/")] = nn.Parameter(rate)
    return learned
