"""The coordinatewise LSTM optimizer as a module.

Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent", arXiv 1606.04474.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metakern.core.backend import check_backend
from metakern.ops import LSTMState, lstm_step, lstm_step_
from metakern.ops.lstm_step import check_options, check_precision, check_scales, prepare
from metakern.ops.lstm_step.prepared import PreparedStep, serves
from metakern.ops.lstm_step.reference import PREPROCESS, num_features
from metakern.ops.lstm_step.state import check_layout, check_sizes
from metakern.rules.pretrained import PretrainedRule


class LSTMWeights(nn.Module):
    """The weights of an ``nn.LSTM``, names and initial values included; torch.compile refuses the module itself.

    Per layer k: weight_ih_lk [4H, F or H], weight_hh_lk [4H, H], bias_ih_lk [4H], bias_hh_lk [4H], U(±1/√H).
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        bound = hidden_size**-0.5
        for layer in range(num_layers):
            shapes = {
                "weight_ih": (4 * hidden_size, hidden_size if layer else input_size),
                "weight_hh": (4 * hidden_size, hidden_size),
                "bias_ih": (4 * hidden_size,),
                "bias_hh": (4 * hidden_size,),
            }
            for name, shape in shapes.items():
                weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
                self.register_parameter(f"{name}_l{layer}", weight)


class CoordinatewiseLSTM(PretrainedRule):
    """One small LSTM, its weights shared by all coordinates, that proposes every parameter's update.

    A drop-in for ``nn.LSTM`` (or a stack of ``nn.LSTMCell``) plus ``nn.Linear``: state_dict names are those of such
    submodules ``lstm`` and ``head``, and :meth:`from_modules` and :meth:`to_modules` convert. All coordinates of a
    model take their step in one launch of :func:`metakern.ops.lstm_step`.

    Args:
        hidden_size: H, 1 to 64.
        num_layers: L, 1 to 3.
        preprocess: ``"log_sign"``, ``"log_and_clip"`` or ``"none"``.
        preprocess_scale: p of the preprocessing.
        output_scale: factor of the head's output.
        backend: ``"auto"``, ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None is ``"auto"``.
        precision: of the products, ``"highest"``, ``"high"`` or ``"medium"``, as in :func:`metakern.ops.lstm_step`.
        bfloat16_state: keep (h, c) in bfloat16, half the memory, on a GPU; the arithmetic stays float32.
        horizon: steps that the rule was meta-trained for; it changes no step, but LearnedOptimizer warns beyond it.
        trained_on: what the rule was meta-trained on, in words, for its model card and that warning.

    Raises:
        ValueError, TypeError: for arguments out of range.

    Example:
        >>> rule = CoordinatewiseLSTM()
        >>> params = {"weight": torch.randn(10, 3), "bias": torch.zeros(10)}
        >>> state = rule.init_state(params)
        >>> grads = {name: 2 * p for name, p in params.items()}
        >>> params, state = rule(params, grads, state)
    """

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        preprocess: str = "log_sign",
        preprocess_scale: float = 10.0,
        output_scale: float = 0.1,
        backend: str | None = None,
        *,
        precision: str = "highest",
        bfloat16_state: bool = False,
        horizon: int | None = None,
        trained_on: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(0, hidden_size, num_layers)
        if preprocess not in PREPROCESS:
            raise ValueError(f"preprocess must be one of {', '.join(PREPROCESS)}, got {preprocess!r}")
        check_scales(preprocess_scale, output_scale)
        check_precision(precision)
        check_backend(backend)
        prepare(backend)
        if not isinstance(bfloat16_state, bool):
            raise TypeError(f"bfloat16_state must be a bool, got {bfloat16_state!r}")
        _check_training(horizon, trained_on)
        self.hidden_size, self.num_layers = hidden_size, num_layers
        self.preprocess, self.preprocess_scale = preprocess, preprocess_scale
        self.output_scale, self.backend = output_scale, backend
        self.precision, self.bfloat16_state = precision, bfloat16_state
        self.horizon, self.trained_on = horizon, trained_on
        self.lstm = LSTMWeights(num_features(preprocess), hidden_size, num_layers)
        self.head = nn.Linear(hidden_size, 1)
        self._prepared: PreparedStep | None = None

    @classmethod
    def from_modules(cls, lstm: nn.LSTM | Sequence[nn.LSTMCell], head: nn.Linear, **options: Any) -> CoordinatewiseLSTM:
        """A rule with a copy of the user's weights, in their dtype and on their device.

        Args:
            lstm: an ``nn.LSTM``, or one ``nn.LSTMCell`` a layer
            head: ``nn.Linear(H, 1)``
            options: the other arguments of the constructor; ``preprocess`` must fit the LSTM's input size

        Raises:
            TypeError: for modules of another kind
            ValueError: for modules that the kernels do not serve; the message names the property.
        """
        modules, named = _lstm_weights(lstm)
        if not isinstance(head, nn.Linear):
            raise TypeError(f"head must be an nn.Linear, got {type(head).__name__}")
        if head.bias is None or not all(module.bias for module in modules):
            raise ValueError("lstm and head must have biases (bias=True)")
        num_layers = lstm.num_layers if isinstance(lstm, nn.LSTM) else len(modules)
        rule = cls(hidden_size=modules[0].hidden_size, num_layers=num_layers, **options).to(head.weight)
        state = {f"lstm.{name}": p for name, p in named.items()} | {f"head.{n}": p for n, p in head.named_parameters()}
        expected = rule.state_dict()
        for name, tensor in state.items():
            if name not in expected or tensor.shape != expected[name].shape:
                shape = list(expected[name].shape) if name in expected else "no such weight"
                raise ValueError(
                    f"{name} must have shape {shape} for preprocess={rule.preprocess!r}, got {list(tensor.shape)}"
                )
        rule.load_state_dict(state)
        return rule

    def to_modules(self) -> tuple[nn.LSTM, nn.Linear]:
        """Copies of the weights as ``nn.LSTM`` and ``nn.Linear``."""
        options: dict[str, Any] = {"device": self.head.weight.device, "dtype": self.head.weight.dtype}
        lstm = nn.LSTM(num_features(self.preprocess), self.hidden_size, self.num_layers, **options)
        head = nn.Linear(self.hidden_size, 1, **options)
        lstm.load_state_dict(self.lstm.state_dict())
        head.load_state_dict(self.head.state_dict())
        return lstm, head

    def weights(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The weights in the order of :func:`metakern.ops.lstm_step`, cast to ``dtype`` (differentiably) if given."""
        # In order of registration; parameters() would cost as much as the rest of the step's Python.
        weights: list[Any] = [*self.lstm._parameters.values(), *self.head._parameters.values()]
        return weights if dtype is None or dtype == weights[0].dtype else [w.to(dtype) for w in weights]

    def init_state(self, params: Any) -> LSTMState:
        """The zero state for a tensor, or a dict, list or tuple (nested at will) of tensors, of any shapes."""
        leaves = _leaves(params, "params")
        return LSTMState.zeros(
            sum(leaf.numel() for leaf in leaves),
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            dtype=self._state_dtype(leaves),
            device=leaves[0].device if leaves else None,
        )

    def _state_dtype(self, leaves: Sequence[Tensor]) -> torch.dtype:
        if any(leaf.dtype == torch.float64 for leaf in leaves):
            return torch.float64
        return torch.bfloat16 if self.bfloat16_state else torch.float32

    def forward(self, params: Any, grads: Any, state: LSTMState) -> tuple[Any, LSTMState]:
        """One step for every coordinate, in one launch.

        Args:
            params: a tensor, or a dict, list or tuple (nested at will) of tensors, of any shapes
            grads: of the same structure and shapes
            state: from :meth:`init_state` or the step before

        Returns:
            new params in the structure of ``params``, new state

        Raises:
            ValueError: for structures or shapes that differ, and as :func:`metakern.ops.lstm_step`.
        """
        if type(state) is LSTMState and (result := self._small_step(params, grads, state)) is not None:
            return result
        check_layout(state)
        leaves, structure = pytree.tree_flatten(params)
        grad_leaves, grad_structure = pytree.tree_flatten(grads)
        if structure != grad_structure:
            raise ValueError(f"grads must have the structure of params, {structure}, got {grad_structure}")
        for index, (leaf, grad) in enumerate(zip(leaves, grad_leaves, strict=True)):
            _check_leaf(leaf, "params", index)
            _check_leaf(grad, "grads", index)
            if leaf.device != leaves[0].device or grad.device != leaves[0].device:
                raise ValueError(
                    f"params and grads must be on one device, {leaves[0].device}: leaf {index} has {leaf.device} and "
                    f"{grad.device}"
                )
            if leaf.shape != grad.shape:
                raise ValueError(
                    f"grads must have the shapes of params: leaf {index} has {list(grad.shape)}, "
                    f"expected {list(leaf.shape)}"
                )
        if not leaves:
            return params, state
        flat, new_state = lstm_step(
            flatten(leaves),
            flatten(grad_leaves),
            state,
            self.weights(state.compute_dtype),
            preprocess=self.preprocess,
            preprocess_scale=self.preprocess_scale,
            output_scale=self.output_scale,
            precision=self.precision,
            backend=self.backend,
        )
        pieces = [flat] if len(leaves) == 1 else flat.split([leaf.numel() for leaf in leaves])
        new_leaves = [piece.view(p.shape).to(p.dtype) for piece, p in zip(pieces, leaves, strict=True)]
        return pytree.tree_unflatten(new_leaves, structure), new_state

    def _small_step(self, params: Any, grads: Any, state: LSTMState) -> tuple[Tensor, LSTMState] | None:
        """The step by :class:`PreparedStep`, None where it does not serve."""
        if torch.is_grad_enabled() or not serves(self.backend):
            return None
        options = self.preprocess, self.preprocess_scale, self.output_scale, self.precision
        prepared, modules = self._prepared, self._modules
        if prepared is None or prepared.options != options:
            check_options(*options)
            prepared = self._prepared = PreparedStep(self.hidden_size, self.num_layers, options)
        # As of weights(), past nn.Module.__getattr__, which takes a microsecond.
        lstm, head = modules["lstm"], modules["head"]
        weights = [*lstm._parameters.values(), *head._parameters.values()]
        return prepared(params, grads, state, weights)

    def step_(self, params: Tensor, grads: Tensor, state: LSTMState, lr: float = 1.0) -> None:
        """One step in place, without a graph: ``params`` [N] and ``state`` are overwritten, the update times ``lr``."""
        lstm_step_(
            params,
            grads,
            state,
            self.weights(state.compute_dtype),
            preprocess=self.preprocess,
            preprocess_scale=self.preprocess_scale,
            output_scale=self.output_scale * lr,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options that the submodules do not show."""
        horizon = "" if self.horizon is None else f", horizon={self.horizon}"
        return (
            f"preprocess={self.preprocess!r}, preprocess_scale={self.preprocess_scale}, "
            f"output_scale={self.output_scale}, precision={self.precision!r}, bfloat16_state={self.bfloat16_state}, "
            f"backend={self.backend!r}{horizon}"
        )

    def described(self) -> str:
        """What the rule is, for its model card."""
        layers = f"{self.num_layers} layer{'s' if self.num_layers > 1 else ''}"
        return (
            "A learned optimizer: one small LSTM, its weights shared by all coordinates, turns the gradient of every "
            "parameter into its update (Andrychowicz et al. 2016, "
            "[arXiv 1606.04474](https://arxiv.org/abs/1606.04474)).\n"
            f"It has {layers} of {self.hidden_size} units, sees gradients by "
            f"`preprocess={self.preprocess!r}` (p = {self.preprocess_scale}), and its output is scaled by "
            f"{self.output_scale}."
        )


def _check_training(horizon: Any, trained_on: Any) -> None:
    if horizon is not None and (not isinstance(horizon, int) or isinstance(horizon, bool)):
        raise TypeError(f"horizon must be an integer or None, got {horizon!r}")
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    if trained_on is not None and not isinstance(trained_on, str):
        raise TypeError(f"trained_on must be a text or None, got {type(trained_on).__name__}")


def _lstm_weights(lstm: Any) -> tuple[list[nn.LSTM | nn.LSTMCell], dict[str, Tensor]]:
    """The modules, and the weights by the names that nn.LSTM gives them."""
    if isinstance(lstm, nn.LSTM):
        for name in ("bidirectional", "proj_size", "dropout"):
            if value := getattr(lstm, name):
                raise ValueError(f"lstm must have {name}={type(value)(0)}, got {name}={value}")
        return [lstm], dict(lstm.named_parameters())
    cells = list(lstm) if isinstance(lstm, (Sequence, nn.ModuleList)) else [lstm]
    if not cells:
        raise ValueError("lstm must be an nn.LSTM or a non-empty sequence of nn.LSTMCell, got an empty sequence")
    for cell in cells:
        if not isinstance(cell, nn.LSTMCell) or cell is lstm:
            raise TypeError(f"lstm must be an nn.LSTM or a sequence of nn.LSTMCell, got {type(cell).__name__}")
    return cells, {f"{n}_l{layer}": p for layer, cell in enumerate(cells) for n, p in cell.named_parameters()}


def _check_leaf(leaf: Any, name: str, index: int) -> None:
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{name} must hold tensors only, got {type(leaf).__name__} as leaf {index}")


def _leaves(tree: Any, name: str) -> list[Tensor]:
    leaves = pytree.tree_leaves(tree)
    for index, leaf in enumerate(leaves):
        _check_leaf(leaf, name, index)
    return leaves


def flatten(leaves: Sequence[Tensor]) -> Tensor:
    """All coordinates in one tensor [N]; mixed dtypes are promoted."""
    return leaves[0].reshape(-1) if len(leaves) == 1 else torch.cat([leaf.reshape(-1) for leaf in leaves])
