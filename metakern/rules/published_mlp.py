"""Reading of weights published for per-parameter MLP optimizers (MetaMLP's layout)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from metakern.core.plain_data import check_flat, read_json
from metakern.ops.mlp_update_step import TENSOR_FEATURES, TIME_FEATURES
from metakern.rules.pretrained import CONFIG, WEIGHTS, read_file


def read_published(folder: str | Path) -> tuple[int, int, dict[str, Tensor]]:
    """Hidden size, number of hidden layers, and weights by name, checked; see PerParameterMLP.from_published."""
    folder = Path(folder).expanduser()
    config, file = folder / CONFIG, folder / WEIGHTS
    for path in (config, file):
        if not path.is_file():
            raise ValueError(f"folder of published weights must hold {CONFIG} and {WEIGHTS}: {path} is missing")
    try:
        content = check_flat(read_json(config))
    except (OSError, ValueError) as error:
        raise ValueError(f"{config} is damaged or no configuration: {error}") from error
    inputs, size, linears = (_integer(config, content, name) for name in ("input_size", "hidden_size", "hidden_layers"))
    if inputs != TENSOR_FEATURES + TIME_FEATURES:
        raise ValueError(f"{config}: input_size must be {TENSOR_FEATURES + TIME_FEATURES}, got {inputs}")
    shapes: dict[str, tuple[int, ...]] = {
        "input": (size, inputs),
        **{f"linear_{i}": (size, size) for i in range(linears)},
        "output": (2, size),
    }
    expected: dict[str, tuple[int, ...]] = {}
    for layer, shape in shapes.items():
        expected |= {f"network.{layer}.weight": shape, f"network.{layer}.bias": shape[:1]}
    _, weights = read_file(file, "cpu")
    missing, extra = expected.keys() - weights.keys(), weights.keys() - expected.keys()
    if missing or extra:
        raise ValueError(
            f"{file} must hold {', '.join(expected)}: missing are {', '.join(sorted(missing)) or 'none'}, unexpected "
            f"are {', '.join(sorted(extra)) or 'none'}"
        )
    for name, shape in expected.items():
        found = weights[name]
        if tuple(found.shape) != shape or not found.is_floating_point():
            raise ValueError(f"{file}: {name} must be floating, {list(shape)}, got {found.dtype} {list(found.shape)}")
        if not bool(found.isfinite().all()):
            raise ValueError(f"{file}: {name} must be finite, got NaN or infinity")
    return size, linears + 1, weights


def _integer(config: Path, content: dict[str, Any], name: str) -> int:
    value = content.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{config}: {name} must be an integer of at least 0, got {value!r}")
    return value
