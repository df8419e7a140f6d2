"""Base class of rules whose step is lstm_step_staged: LSTM cells with other features and another head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from metakern.ops import LSTMState, lstm_step_staged, lstm_step_staged_
from metakern.ops.lstm_step import reference
from metakern.ops.lstm_step.stacked import lstm_step_stacked
from metakern.ops.lstm_step.state import TILE_LANES, check_layout, tiles
from metakern.rules.lstm_cells import LSTMCells
from metakern.rules.plain_lstm import PlainStages
from metakern.rules.protocol import check_loss


class StagedRule(LSTMCells):
    """Base of rules made of a features stage, LSTM cells and a head stage, in one launch.

    The state is a dict: the LSTM's (h, c), ``"lstm"``, and the tiles of what the stages keep, [ceil(N/32), E, 32]. A
    subclass names the stages and returns their weights and numbers.

    Attributes:
        features: name of the features stage, of :data:`metakern.ops.lstm_step.reference.FEATURES`
        head_stage: name of the head stage, of ``HEADS``
        kept: name of what the stages keep
    """

    features: ClassVar[str]
    head_stage: ClassVar[str]
    kept: ClassVar[str]

    def stages(self) -> tuple[reference.FeaturesStage, reference.HeadStage]:
        """The two stages."""
        return reference.FEATURES[self.features], reference.HEADS[self.head_stage]

    def stage_options(self) -> dict[str, Any]:
        """The stages' numbers, as :func:`metakern.ops.lstm_step_staged` takes them."""
        raise NotImplementedError

    def fed(self, grads: Tensor) -> Tensor:
        """The gradients that the step receives."""
        return grads

    def init_coordinates(self, number: int, dtype: torch.dtype, device: torch.device | None) -> dict[str, Any]:
        """Zeros for N coordinates."""
        rows = sum(stage.states for stage in self.stages())
        own = torch.zeros(tiles(number), rows, TILE_LANES, dtype=dtype, device=device)
        return {"lstm": self.zero_cells(number, dtype, device), self.kept: own}

    def step_coordinates(
        self, params: Tensor, grads: Tensor, state: dict[str, Any], loss: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """:func:`metakern.ops.lstm_step_staged` with the rule's weights and options."""
        arguments, options = self._call(params, grads, state, loss)
        new, cells, own = (lstm_step_staged if self.copies is None else lstm_step_stacked)(*arguments, **options)
        return new, {"lstm": cells, self.kept: own}

    @torch.no_grad()
    def step_(
        self, params: Tensor, grads: Tensor, state: dict[str, Any], lr: float = 1.0, *, loss: Tensor | None = None
    ) -> None:
        """One step in place, without a graph: ``params`` [N] and ``state`` are overwritten, the update times ``lr``."""
        self.check_state(state)
        losses = check_loss(self, loss)
        arguments, options = self._call(params, grads, state, None if losses is None else losses.expand(params.shape))
        before = None
        if "head_scale" in options:
            options["head_scale"] *= lr
        elif lr != 1:
            before = params.clone()
        lstm_step_staged_(*arguments, **options)
        if before is not None:
            torch.lerp(before, params, lr, out=params)

    def _call(
        self, params: Tensor, grads: Tensor, state: dict[str, Any], loss: Tensor | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cells: LSTMState = state["lstm"]
        dtype = cells.compute_dtype
        options = {"features": self.features, "head": self.head_stage, **self.stage_options()}
        options |= {"stage_state": state[self.kept], "precision": self.precision, "backend": self.backend}
        if loss is not None:
            options["coordinate_inputs"] = loss.to(dtype).unsqueeze(0)
        elif self.copies is not None:
            options["coordinate_inputs"] = params.new_empty(0, params.numel(), dtype=dtype)
        return (params, self.fed(grads), cells, self.weights(dtype)), options

    def packed(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """(h, c) and the stages' state, in tiles of 32 coordinates."""
        return {"lstm": state["lstm"].data, self.kept: state[self.kept]}

    def from_packed(self, tensors: Mapping[str, Tensor], number: int) -> dict[str, Any]:
        """The state made of these tiles."""
        return {"lstm": LSTMState(tensors["lstm"], number), self.kept: tensors[self.kept]}

    def check_state(self, state: Any) -> None:
        """Raise unless it is a state of this rule and of its sizes."""
        super().check_state(state)
        if state.keys() != {"lstm", self.kept}:
            raise ValueError(
                f"state must be one of {type(self).__name__}, with 'lstm' and {self.kept!r}, got one with "
                f"{', '.join(map(repr, state))}"
            )
        cells = state["lstm"]
        check_layout(cells)
        if (cells.num_layers, cells.hidden_size) != (self.num_layers, self.hidden_size):
            raise ValueError(
                f"state must have the rule's {self.num_layers} layers of {self.hidden_size} units, got "
                f"{cells.num_layers} of {cells.hidden_size}"
            )

    def state_layout(self) -> tuple[int, int]:
        """H and L."""
        return self.hidden_size, self.num_layers

    def state_header(self) -> dict[str, Any]:
        """The rule's name, H and L."""
        return {**super().state_header(), "hidden_size": self.hidden_size, "num_layers": self.num_layers}

    def plain(self) -> PlainStages:
        """The same weights in plain PyTorch."""
        return PlainStages(self)

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.option_types())
