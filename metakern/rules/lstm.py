"""The coordinatewise LSTM optimizer as a module.

Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent", arXiv 1606.04474.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metakern.core.backend import check_backend
from metakern.ops import LSTMState, lstm_step, lstm_step_, pack_state, unpack_state
from metakern.ops.lstm_step import check_options, check_precision, check_scales, prepare
from metakern.ops.lstm_step.prepared import PreparedStep, serves
from metakern.ops.lstm_step.reference import PREPROCESS, num_features
from metakern.ops.lstm_step.state import TILE_LANES, check_layout, check_sizes
from metakern.rules.coordinatewise import CoordinatewiseRule
from metakern.rules.lstm_modules import LSTMWeights, lstm_weights
from metakern.rules.plain_lstm import PlainLSTM
from metakern.rules.protocol import Params, State

_SAVED_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class CoordinatewiseLSTM(CoordinatewiseRule):
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

    title: ClassVar[str] = "Learned LSTM"
    unit: ClassVar[int] = TILE_LANES
    optional_options: ClassVar[tuple[str, ...]] = (
        *("precision", "bfloat16_state", "backend"),
        *CoordinatewiseRule.optional_options,
    )
    advice_for_other_networks: ClassVar[str] = (
        f"{CoordinatewiseRule.advice_for_other_networks}; `digits_lstm` wants 0.03 to 0.3"
    )
    advice_beyond_horizon: ClassVar[str] = (
        f"{CoordinatewiseRule.advice_beyond_horizon}, and start other networks at an lr of 0.03 to 0.3"
    )

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
        modules, named = lstm_weights(lstm)
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

    def init_coordinates(self, number: int, dtype: torch.dtype, device: torch.device | None) -> LSTMState:
        """The zero state of N coordinates, in float64 for that dtype, else in float32 or bfloat16."""
        narrow = self.bfloat16_state and dtype != torch.float64
        return LSTMState.zeros(
            number,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            dtype=torch.bfloat16 if narrow else dtype,
            device=device,
        )

    def forward(
        self, params: Params, grads: Params, state: State, *, loss: Tensor | None = None
    ) -> tuple[Params, State]:
        """One step for every coordinate, in one launch; see :meth:`Rule.forward`."""
        if loss is None and type(state) is LSTMState and (result := self._small_step(params, grads, state)) is not None:
            return result
        return super().forward(params, grads, state, loss=loss)

    def _small_step(self, params: Any, grads: Any, state: LSTMState) -> tuple[Tensor, LSTMState] | None:
        """The step by :class:`PreparedStep`, None where it does not serve."""
        if torch.is_grad_enabled() or type(self) is not CoordinatewiseLSTM or not serves(self.backend):
            return None  # a subclass may take steps of its own
        options = self.preprocess, self.preprocess_scale, self.output_scale, self.precision
        prepared, modules = self._prepared, self._modules
        if prepared is None or prepared.options != options:
            check_options(*options)
            prepared = self._prepared = PreparedStep(self.hidden_size, self.num_layers, options)
        # As of weights(), past nn.Module.__getattr__, which takes a microsecond.
        lstm: Any = modules["lstm"]
        head: Any = modules["head"]
        return prepared(params, grads, state, [*lstm._parameters.values(), *head._parameters.values()])

    def step_coordinates(
        self, params: Tensor, grads: Tensor, state: LSTMState, loss: Tensor | None = None
    ) -> tuple[Tensor, LSTMState]:
        """:func:`metakern.ops.lstm_step` with the rule's weights and options."""
        del loss
        return lstm_step(
            params,
            grads,
            state,
            self.weights(state.compute_dtype),
            preprocess=self.preprocess,
            preprocess_scale=self.preprocess_scale,
            output_scale=self.output_scale,
            precision=self.precision,
            backend=self.backend,
        )

    def step_(
        self, params: Tensor, grads: Tensor, state: LSTMState, lr: float = 1.0, *, loss: Tensor | None = None
    ) -> None:
        """One step in place, without a graph: ``params`` [N] and ``state`` are overwritten, the update times ``lr``."""
        del loss
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

    def plain(self) -> PlainLSTM:
        """The same weights in ``nn.LSTMCell`` and ``nn.Linear``."""
        return PlainLSTM(self)

    def packed(self, state: LSTMState) -> dict[str, Tensor]:
        """(h, c) in tiles of 32 coordinates."""
        return {"lstm": state.data}

    def from_packed(self, tensors: Mapping[str, Tensor], number: int) -> LSTMState:
        """The state that the tiles are."""
        return LSTMState(tensors["lstm"], number)

    def select_coordinates(self, state: LSTMState, index: Tensor) -> LSTMState:
        """The state of some coordinates."""
        h, c = unpack_state(state)
        return pack_state(h[:, index], c[:, index])

    def check_state(self, state: Any) -> None:
        """Raise unless it is an LSTMState of this version."""
        check_layout(state)

    def state_layout(self) -> tuple[int, int, bool]:
        """H, L, and whether in bfloat16."""
        return self.hidden_size, self.num_layers, self.bfloat16_state

    def state_header(self) -> dict[str, Any]:
        """H and L."""
        return {"hidden_size": self.hidden_size, "num_layers": self.num_layers}

    def export_state(self, tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """H and c, [L, N, H] each."""
        return dict(zip(("h", "c"), unpack_state(self.from_packed(tensors, number)), strict=True))

    def import_state(self, saved: Mapping[str, Any], param: Tensor, name: str) -> dict[str, Tensor]:
        """The tiles of h and c."""
        if not {"h", "c"} <= saved.keys():
            raise ValueError(f"state of {name} must be a dict with the keys ('step', 'h', 'c'), got {list(saved)}")
        like = self.init_state(param.new_empty(0)).data
        shape = (self.num_layers, param.numel(), self.hidden_size)
        h, c = (_check_saved(saved[key], key, shape, name).to(like) for key in ("h", "c"))
        return self.packed(pack_state(h, c))

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


def _check_saved(value: Any, key: str, shape: tuple[int, ...], name: str) -> Tensor:
    is_tensor = isinstance(value, Tensor)
    if not is_tensor or value.dtype not in _SAVED_DTYPES or value.layout != torch.strided or value.shape != shape:
        got = f"{value.dtype} {value.layout} {list(value.shape)}" if is_tensor else type(value).__name__
        raise ValueError(
            f"{key} of {name} must be dense float32, float64 or bfloat16 [L, numel, H] = {list(shape)}, got {got}"
        )
    found: Tensor = value.detach()
    return found
