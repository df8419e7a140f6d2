"""Per-model caches are freed with the model, and do not grow."""

from __future__ import annotations

import gc
import weakref

import pytest
from torch import nn

from metakern import meta_loss
from metakern.inner_loop.engines import mlp as engine
from metakern.inner_loop.remembered import Remembered
from tests.inner_loops import mlp, regression

pytestmark = pytest.mark.usefixtures("one_thread")


def test_values_are_found_by_model_and_key() -> None:
    remembered, model = Remembered[str](most=2), nn.Linear(1, 1)
    assert remembered.get(model, "a") is None
    remembered.put(model, "a", "first")
    assert remembered.get(model, "a") == "first"
    assert remembered.get(nn.Linear(1, 1), "a") is None, "another model that is the same"
    remembered.put(model, "a", "second")
    assert remembered.get(model, "a") == "second"
    assert len(remembered) == 1


def test_the_oldest_entries_make_place() -> None:
    remembered, model = Remembered[int](most=2), nn.Linear(1, 1)
    for key in range(5):
        remembered.put(model, key, key)
    assert [remembered.get(model, key) for key in range(5)] == [None, None, None, 3, 4]
    assert len(remembered) == 2


def test_a_model_is_not_kept_alive_and_takes_its_entries_along() -> None:
    remembered, model = Remembered[int](most=2), nn.Linear(1, 1)
    gone = weakref.ref(model)
    remembered.put(model, "a", 1)
    del model
    gc.collect()
    assert gone() is None
    assert len(remembered) == 0


def test_calls_of_many_models_and_sizes_leave_little() -> None:
    engine.served_before.clear()
    kept = mlp(1, 3, 1)
    for samples in range(1, 13):
        for model in (kept, mlp(1, 3, 1)):
            episode = regression(2, samples, 2, 1, 1)
            meta_loss(model, episode.support, episode.query)
    del model
    gc.collect()
    assert len(engine.served_before) == engine.served_before.most
    del kept
    gc.collect()
    assert len(engine.served_before) == 0


def test_another_thread_finds_whole_entries() -> None:
    """A put replaces all entries of a model atomically."""
    remembered, model = Remembered[int](most=3), nn.Linear(1, 1)
    remembered.put(model, 0, 0)
    before = remembered._of(model)
    remembered.put(model, 1, 1)
    assert before == {0: 0}
