"""The coordinatewise LSTM optimizer as a module.

Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent", arXiv 1606.04474.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from metakern.ops import LSTMState, lstm_step, lstm_step_, pack_state, unpack_state
from metakern.ops.lstm_step import check_options
from metakern.ops.lstm_step.prepared import PreparedStep, serves
from metakern.ops.lstm_step.stacked import lstm_step_stacked
from metakern.ops.lstm_step.state import TILE_LANES, check_layout
from metakern.rules.lstm_modules import LSTMWeights as LSTMWeights  # pickles of earlier versions name it here
from metakern.rules.lstm_rule import LSTMRule
from metakern.rules.protocol import Params, State

_SAVED_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class CoordinatewiseLSTM(LSTMRule):
    """Coordinatewise LSTM optimizer: one small LSTM, shared by all coordinates, computes every parameter's update.

    A drop-in for ``nn.LSTM`` (or a stack of ``nn.LSTMCell``) plus ``nn.Linear``: state_dict has the names of such
    submodules, ``lstm`` and ``head``, and :meth:`from_modules` and :meth:`to_modules` convert. One launch of
    :func:`metakern.ops.lstm_step` steps all coordinates of a model.

    Args:
        hidden_size: H, 1 to 64.
        num_layers: L, 1 to 3.
        preprocess: ``"log_sign"``, ``"log_and_clip"`` or ``"none"``.
        preprocess_scale: p of the preprocessing.
        output_scale: factor of the head's output.
        backend: ``"auto"``, ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None is ``"auto"``.
        precision: of the products, ``"highest"``, ``"high"`` or ``"medium"``, as in :func:`metakern.ops.lstm_step`.
        bfloat16_state: keep (h, c) in bfloat16, half the memory, on a GPU; the arithmetic stays float32.
        horizon: steps that the rule was meta-trained for; only used by LearnedOptimizer, which warns beyond it.
        trained_on: description of the meta-training tasks, for the model card and that warning.

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
    takes_copies: ClassVar[bool] = True

    _prepared: PreparedStep | None = None

    def init_coordinates(self, number: int, dtype: torch.dtype, device: torch.device | None) -> LSTMState:  # type: ignore[override]  # a state of its own
        """The zero state of N coordinates."""
        return self.from_packed(super().init_coordinates(number, dtype, device), number)

    def forward(
        self, params: Params, grads: Params, state: State, *, loss: Tensor | None = None
    ) -> tuple[Params, State]:
        """One step for every coordinate, in one launch; see :meth:`Rule.forward`."""
        if type(state) is LSTMState and not torch.is_grad_enabled() and (prepared := self._prepare()) is not None:
            result = prepared(params, grads, state, self.own_weights(), self.output_scale)
            if result is not None:
                return result
        return super().forward(params, grads, state, loss=loss)

    def _prepare(self) -> PreparedStep | None:
        """The :class:`PreparedStep` that serves small steps; None where it cannot."""
        if type(self) is not CoordinatewiseLSTM or not serves(self.backend):
            return None  # a subclass may take steps of its own
        options = self.preprocess, self.preprocess_scale, self.precision
        copies = self.copies or 1
        if self._prepared is None or (self._prepared.options, self._prepared.copies) != (options, copies):
            check_options(*options[:2], self.output_scale, self.precision)
            self._prepared = PreparedStep(self.hidden_size, self.num_layers, options, copies)
        return self._prepared

    def step_coordinates(
        self, params: Tensor, grads: Tensor, state: LSTMState, loss: Tensor | None = None
    ) -> tuple[Tensor, LSTMState]:
        """:func:`metakern.ops.lstm_step` with the rule's weights and options."""
        del loss
        weights = self.weights(state.compute_dtype)
        if self.copies is None:
            return lstm_step(params, grads, state, weights, **self.step_options())
        tiles, dtype = len(state.data), state.compute_dtype
        new, new_state, _ = lstm_step_stacked(
            *(params, grads, state, weights),
            features=self.preprocess,
            head="add",
            stage_state=params.new_empty(tiles, 0, TILE_LANES, dtype=dtype),
            coordinate_inputs=params.new_empty(0, params.numel(), dtype=dtype),
            features_scale=self.preprocess_scale,
            head_scale=self.output_scale,
            precision=self.precision,
            backend=self.backend,
        )
        return new, new_state

    def step_(
        self, params: Tensor, grads: Tensor, state: LSTMState, lr: float = 1.0, *, loss: Tensor | None = None
    ) -> None:
        """One step in place, without a graph: ``params`` [N] and ``state`` are overwritten, the update times ``lr``."""
        del loss
        output_scale = self.output_scale * lr
        prepared = self._prepare() if type(state) is LSTMState else None
        if prepared is not None and prepared.step_(params, grads, state, self.own_weights(), output_scale):
            return
        options = self.step_options() | {"output_scale": output_scale}
        lstm_step_(params, grads, state, self.weights(state.compute_dtype), **options)

    def packed(self, state: LSTMState) -> dict[str, Tensor]:
        """(h, c) in tiles of 32 coordinates."""
        return {"lstm": state.data}

    def from_packed(self, tensors: Mapping[str, Tensor], number: int) -> LSTMState:
        """The state made of these tiles."""
        return LSTMState(tensors["lstm"], number)

    def check_state(self, state: Any) -> None:
        """Raise unless it is an LSTMState of this version."""
        check_layout(state)

    def state_header(self) -> dict[str, Any]:
        """H and L."""
        return {"hidden_size": self.hidden_size, "num_layers": self.num_layers}

    def export_state(self, tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
        """Hidden and cell states, ``h`` and ``c``, [L, N, H] each."""
        return dict(zip(("h", "c"), unpack_state(self.from_packed(tensors, number)), strict=True))

    def import_state(self, saved: Mapping[str, Any], param: Tensor, name: str) -> dict[str, Tensor]:
        """The tiles of h and c."""
        if not {"h", "c"} <= saved.keys():
            raise ValueError(f"state of {name} must be a dict with the keys ('step', 'h', 'c'), got {list(saved)}")
        like = self.init_state(param.new_empty(0)).data
        shape = (self.num_layers, param.numel(), self.hidden_size)
        h, c = (_check_saved(saved[key], key, shape, name).to(like) for key in ("h", "c"))
        return self.packed(pack_state(h, c))


def _check_saved(value: Any, key: str, shape: tuple[int, ...], name: str) -> Tensor:
    is_tensor = isinstance(value, Tensor)
    if not is_tensor or value.dtype not in _SAVED_DTYPES or value.layout != torch.strided or value.shape != shape:
        got = f"{value.dtype} {value.layout} {list(value.shape)}" if is_tensor else type(value).__name__
        raise ValueError(
            f"{key} of {name} must be dense float32, float64 or bfloat16 [L, numel, H] = {list(shape)}, got {got}"
        )
    found: Tensor = value.detach()
    return found
