"""Base class of update rules around the step of lstm_step.

Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent", arXiv 1606.04474.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from metakern.ops import LSTMState, lstm_step
from metakern.ops.lstm_step import check_scales
from metakern.ops.lstm_step.reference import PREPROCESS, num_features
from metakern.rules.lstm_cells import LSTMCells
from metakern.rules.lstm_modules import lstm_weights
from metakern.rules.plain_lstm import PlainLSTM


class LSTMRule(LSTMCells):
    """Base of rules whose update comes from the LSTM of :func:`metakern.ops.lstm_step`.

    The state is a dict of packed tensors: the LSTM's tiles, ``lstm``, and ``beside``. Subclasses implement
    ``step_coordinates`` around :meth:`step_lstm`; arguments as for :class:`metakern.rules.CoordinatewiseLSTM`.

    Attributes:
        beside: names of further state tensors, one number per coordinate, initially zero
    """

    beside: ClassVar[tuple[str, ...]] = ()

    optional_options: ClassVar[tuple[str, ...]] = ("bfloat16_state", *LSTMCells.optional_options)
    advice_for_other_networks: ClassVar[str] = f"{LSTMCells.advice_for_other_networks}; `digits_lstm` wants 0.03 to 0.3"
    advice_beyond_horizon: ClassVar[str] = (
        f"{LSTMCells.advice_beyond_horizon}, and start other networks at an lr of 0.03 to 0.3"
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
        if preprocess not in PREPROCESS:
            raise ValueError(f"preprocess must be one of {', '.join(PREPROCESS)}, got {preprocess!r}")
        inputs, head = num_features(preprocess), (hidden_size, 1)
        super().__init__(hidden_size, num_layers, backend, precision, horizon, trained_on, inputs=inputs, head=head)
        check_scales(preprocess_scale, output_scale)
        if not isinstance(bfloat16_state, bool):
            raise TypeError(f"bfloat16_state must be a bool, got {bfloat16_state!r}")
        self.preprocess, self.preprocess_scale = preprocess, preprocess_scale
        self.output_scale, self.bfloat16_state = output_scale, bfloat16_state

    @classmethod
    def from_modules(cls, lstm: nn.LSTM | Sequence[nn.LSTMCell], head: nn.Linear, **options: Any) -> Self:
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

    def init_coordinates(self, number: int, dtype: torch.dtype, device: torch.device | None) -> dict[str, Tensor]:
        """The zero state of N coordinates, in ``dtype``; with ``bfloat16_state`` float32 LSTM tiles become bfloat16."""
        kept = torch.bfloat16 if self.bfloat16_state and dtype != torch.float64 else dtype
        tiles = self.zero_cells(number, kept, device).data
        shape = (len(tiles), self.unit)
        return {"lstm": tiles} | {name: torch.zeros(shape, dtype=dtype, device=device) for name in self.beside}

    def step_lstm(self, params: Tensor, grads: Tensor, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """:func:`metakern.ops.lstm_step` with the rule's weights and options.

        Args:
            params: [N]
            grads: [N]
            tiles: the LSTM's state, [ceil(N/32), L, 2, H, 32]

        Returns:
            new params, new tiles
        """
        state = LSTMState(tiles, params.numel())
        new, new_state = lstm_step(params, grads, state, self.weights(state.compute_dtype), **self.step_options())
        return new, new_state.data

    def step_options(self) -> dict[str, Any]:
        """Options of :func:`metakern.ops.lstm_step`."""
        return {
            "preprocess": self.preprocess,
            "preprocess_scale": self.preprocess_scale,
            "output_scale": self.output_scale,
            "precision": self.precision,
            "backend": self.backend,
        }

    def state_layout(self) -> tuple[int, int, bool]:
        """H, L and ``bfloat16_state``."""
        return self.hidden_size, self.num_layers, self.bfloat16_state

    def plain(self) -> PlainLSTM:
        """The same weights in ``nn.LSTMCell`` and ``nn.Linear``."""
        return PlainLSTM(self)

    def extra_repr(self) -> str:
        """The options not shown by the submodules."""
        horizon = "" if self.horizon is None else f", horizon={self.horizon}"
        return (
            f"preprocess={self.preprocess!r}, preprocess_scale={self.preprocess_scale}, "
            f"output_scale={self.output_scale}, precision={self.precision!r}, bfloat16_state={self.bfloat16_state}, "
            f"backend={self.backend!r}{horizon}"
        )

    def described(self) -> str:
        """Description for the model card."""
        layers = f"{self.num_layers} layer{'s' if self.num_layers > 1 else ''}"
        return (
            "A learned optimizer: one small LSTM, its weights shared by all coordinates, turns the gradient of every "
            "parameter into its update (Andrychowicz et al. 2016, "
            "[arXiv 1606.04474](https://arxiv.org/abs/1606.04474)).\n"
            f"It has {layers} of {self.hidden_size} units, sees gradients by "
            f"`preprocess={self.preprocess!r}` (p = {self.preprocess_scale}), and its output is scaled by "
            f"{self.output_scale}."
        )
