"""Validation of a checkpoint's values before any of them is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from metakern.core.text import quoted
from metakern.training.checkpoints import CheckpointError


def check_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming the key, for an invalid state.

    Args:
        state: of a checkpoint, with the keys of ``own``
        own: state of the training that will load it
    """
    iteration = _count(state["iteration"], "iteration")
    worse = _count(state["worse"], "worse")
    history = _mapping(state["history"], "history", own["history"])
    _check_columns(history["columns"], own["history"]["columns"], iteration)
    evaluations = _check_evaluations(history["evaluations"], iteration)
    if worse > evaluations:
        raise _error("worse", f"at most {evaluations}, the number of evaluations", worse)
    if not isinstance(state["learner"], dict):
        raise _error("learner", "a dict", state["learner"])
    _check_best(state, history, iteration)
    _check_outer(_mapping(state["outer"], "outer", own["outer"]), history["columns"]["skipped"])
    _check_optimizer(state["optimizer"])
    if state["scheduler"] is not None and own["scheduler"] is not None:
        _check_scheduler(state["scheduler"], own["scheduler"])
    if state["average"] is not None and own["average"] is not None:
        average = _mapping(state["average"], "average", own["average"])
        _count(average["steps"], "average.steps")
        names = average["average"] if isinstance(average["average"], dict) else own["average"]["average"]
        _check_shapes(average["average"], {n: state["learner"].get(n) for n in names}, "average.average")


def _check_columns(columns: Any, own: Mapping[str, Tensor], iteration: int) -> None:
    columns = _mapping(columns, "history.columns", own)
    for name, column in columns.items():
        key = f"history.columns.{name}"
        if not isinstance(column, Tensor) or column.dtype != own[name].dtype or column.dim() != 1:
            raise _error(key, f"a vector of {own[name].dtype}", column)
        if len(column) != iteration:
            raise _error(key, f"one number for each of {iteration} iterations", f"{len(column)} numbers")
    if columns["iteration"].tolist() != list(range(1, iteration + 1)):
        raise _error("history.columns.iteration", f"the numbers 1 to {iteration}", columns["iteration"].tolist())
    for name in ("lr", "seconds"):  # loss and norm may be NaN or infinite: those steps are skipped
        if not bool(columns[name].isfinite().all()):
            raise _error(f"history.columns.{name}", "finite", columns[name].tolist())
    skipped = columns["skipped"]
    if bool((skipped < 0).any()) or bool((skipped.diff() < 0).any()):
        raise _error("history.columns.skipped", "counts that do not fall", skipped.tolist())


def _check_evaluations(evaluations: Any, iteration: int) -> int:
    if not isinstance(evaluations, list):
        raise _error("history.evaluations", "a list", evaluations)
    before = 0
    for entry in evaluations:
        if not isinstance(entry, tuple) or len(entry) != 2 or not isinstance(entry[1], dict):
            raise _error("history.evaluations", "pairs of an iteration and measures", entry)
        at, measures = entry
        if _count(at, "history.evaluations") <= before or at > iteration:
            raise _error("history.evaluations", f"at iterations that rise to {iteration} at most", at)
        if not all(isinstance(name, str) and type(value) is float for name, value in measures.items()):
            raise _error("history.evaluations", "numbers by name", measures)
        before = at
    return len(evaluations)


def _check_best(state: Mapping[str, Any], history: Mapping[str, Any], iteration: int) -> None:
    best, at, weights = history["best"], history["best_iteration"], state["best_weights"]
    if best is None and at is None and weights is None:
        return
    if type(best) is not float or not math.isfinite(best):
        raise _error("history.best", "a finite number", best)
    if not 1 <= _count(at, "history.best_iteration") <= iteration:
        raise _error("history.best_iteration", f"from 1 to {iteration}", at)
    _check_shapes(weights, state["learner"], "best_weights")


def _check_outer(outer: Mapping[str, Any], skipped: Tensor) -> None:
    total = _count(outer["skipped"], "outer.skipped")
    if total != (int(skipped[-1]) if len(skipped) else 0):
        raise _error("outer.skipped", "the number of skipped steps in the history", total)
    if _count(outer["in_a_row"], "outer.in_a_row") > total:
        raise _error("outer.in_a_row", f"at most {total}, the number of skipped steps", outer["in_a_row"])
    _check_numbers(outer["scaler"], "outer.scaler")


def _check_optimizer(state: Any) -> None:
    if not isinstance(state, dict) or not isinstance(state.get("param_groups"), list) or "state" not in state:
        raise _error("optimizer", "a state with param_groups", state)
    for index, group in enumerate(state["param_groups"]):
        where = f"optimizer.param_groups[{index}]"
        if not isinstance(group, dict):
            raise _error(where, "a group of parameters", group)
        _check_numbers(group, where, finite=True)
        if "lr" in group and not float(group["lr"]) >= 0:
            raise _error(f"{where}.lr", "at least 0", group["lr"])
    entries = state["state"].items() if isinstance(state["state"], dict) else ()
    for name, entry in entries:
        step = entry.get("step") if isinstance(entry, dict) else None
        if step is None:
            continue
        single = isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1)
        if not single or not math.isfinite(float(step)) or float(step) < 0:
            raise _error(f"optimizer.state[{name!r}].step", "a count", step)


def _check_scheduler(state: Any, own: Mapping[str, Any]) -> None:
    if not isinstance(state, dict):
        raise _error("scheduler", "a dict", state)
    for name, value in state.items():
        if isinstance(own.get(name), int | float) and not isinstance(value, int | float):
            raise _error(f"scheduler.{name}", "a number", value)
        if name in ("last_epoch", "_step_count"):
            _count(value, f"scheduler.{name}")
    _check_numbers(state, "scheduler")


def _check_numbers(tree: Any, where: str, *, finite: bool = False) -> None:
    """Raise for NaN, for infinity if ``finite``, and for integers of more than 64 bits."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            _check_numbers(value, f"{where}.{name}", finite=finite)
    elif isinstance(tree, list | tuple):
        for value in tree:
            _check_numbers(value, where, finite=finite)
    elif isinstance(tree, Tensor):
        if tree.is_floating_point() and not bool((tree.isfinite() if finite else ~tree.isnan()).all()):
            raise _error(where, "finite" if finite else "a number", tree.tolist())
    elif isinstance(tree, int) and tree.bit_length() > 64:
        raise _error(where, "of at most 64 bits", tree)
    elif isinstance(tree, float) and not (math.isfinite(tree) if finite else not math.isnan(tree)):
        raise _error(where, "finite" if finite else "a number", tree)


def _check_shapes(found: Any, expected: Mapping[str, Any], where: str) -> None:
    """Raise unless ``found`` has the names, shapes and dtypes of ``expected``."""
    found = _mapping(found, where, expected)
    for name, tensor in expected.items():
        if not isinstance(tensor, Tensor):
            continue
        other = found[name]
        if not isinstance(other, Tensor) or other.shape != tensor.shape or other.dtype != tensor.dtype:
            raise _error(f"{where}.{name}", f"of shape {list(tensor.shape)} and {tensor.dtype}", _described(other))


def _mapping(value: Any, where: str, own: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _error(where, "a dict", value)
    if value.keys() != own.keys():
        raise _error(where, f"a dict of {', '.join(map(str, own))}", list(value))
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise _error(where, "an integer of at least 0", value)
    return value


def _described(value: Any) -> Any:
    return f"{list(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else value


def _error(where: str, expected: str, value: Any) -> CheckpointError:
    return CheckpointError(f"the checkpoint's {where} must be {expected}, got {quoted(value)}")
