"""Contract of every task distribution: seeds, splits, selections, copies, devices, errors."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from metakern.tasks import SPLITS, Episodes, TaskDistribution
from tests.conformance.tasks.contents import contents
from tests.conformance.tasks.rows import ROWS, Row
from tests.tasks.draws import count_calls, generator

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
every_own_row = pytest.mark.parametrize("row", [row for row in ROWS if not row.own], ids=lambda row: row.name)


@every_row
@pytest.mark.parametrize("num_tasks", [1, 4])
def test_a_batch_has_as_many_tasks_as_asked(tasks: Any, num_tasks: int) -> None:
    assert isinstance(tasks, TaskDistribution)
    batch = tasks.sample(num_tasks, generator())
    assert batch.num_tasks == num_tasks == len(contents(batch))


@every_row
def test_the_generator_decides_everything(tasks: Any) -> None:
    first, again, other = (contents(tasks.sample(5, generator(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(torch.cat([first, other]).unique(dim=0)) == 10  # no task comes twice


@every_row
def test_the_generator_moves_with_samples_alone(tasks: Any) -> None:
    """Processes that use their shares of a batch differently still draw the same next tasks."""
    left, right = generator(), generator()
    contents(tasks.sample(6, left))
    tasks.sample(6, right)
    assert torch.equal(left.get_state(), right.get_state())
    following = [contents(tasks.sample(6, stream)) for stream in (left, right)]
    assert torch.equal(*following)
    assert not torch.equal(following[0], contents(tasks.sample(6, generator())))


@every_row
def test_the_global_generator_is_left_alone(row: Row, tasks: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        contents(tasks.split("valid").sample(3, generator()))
        assert torch.equal(torch.get_rng_state(), before)


@every_row
@pytest.mark.parametrize(
    "chosen",
    [slice(0, 3), slice(3, 6), slice(1, 6, 2), torch.tensor([0, 4]), torch.arange(6) % 3 == 1],
    ids=["first", "last", "odd", "indices", "mask"],
)
def test_selected_tasks_are_those_of_the_whole_batch(tasks: Any, chosen: slice | torch.Tensor) -> None:
    """Processes share a batch this way: all draw it, and each takes a slice."""
    batch = tasks.sample(6, generator())
    whole = contents(batch)
    selected = tasks.sample(6, generator()).select(chosen)
    assert selected.num_tasks == len(whole[chosen])
    exact = isinstance(batch, Episodes)  # batched matrix products may round differently
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(contents(selected), whole[chosen], **tolerance)


@every_row
def test_selections_of_one_batch_do_not_disturb_each_other(tasks: Any) -> None:
    """A process may therefore split its share further."""
    whole = contents(tasks.sample(6, generator()))
    batch = tasks.sample(6, generator())
    parts = [batch.select(slice(0, 2)), batch.select(slice(2, 6)).select(slice(1, 3)), batch.select(slice(None))]
    for part, expected in zip(parts, [whole[0:2], whole[3:5], whole], strict=True):
        torch.testing.assert_close(contents(part), expected, rtol=1e-5, atol=1e-6)


@every_row
def test_splits_share_nothing_even_from_one_seed(row: Row, tasks: Any) -> None:
    """Splits of splits share nothing either, and splitting does not change the distribution."""
    splits = [tasks.split(name) for name in SPLITS]
    drawn = [row.material(split.sample(20, generator())).flatten(1).unique(dim=0) for split in splits]
    for name, rows in zip(SPLITS, drawn, strict=True):
        again = tasks.split("test").split(name).sample(20, generator())
        assert torch.equal(row.material(again).flatten(1).unique(dim=0), rows)
    assert torch.equal(row.material(tasks.sample(20, generator())).flatten(1).unique(dim=0), drawn[0])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        both = torch.cat([drawn[i], drawn[j]])
        assert len(both.unique(dim=0)) == len(both)


@every_own_row
def test_batches_move_between_devices(row: Row, tasks: Any) -> None:
    """The meta device computes no values: a tensor that was not moved raises, or is found."""
    batch = tasks.sample(4, generator()).to("meta").select(slice(0, 3))
    if isinstance(batch, Episodes):
        held = [x for x in vars(batch).values() if x is not None]
    else:
        held = [batch.full_loss(batch.init_params()), *pytree.tree_leaves(batch.init_params())]
    assert {x.device.type for x in held} == {"meta"}


@every_own_row
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_give_the_same_tasks(row: Row, tasks: Any, copied: Any) -> None:
    expected = contents(tasks.sample(3, generator()))
    assert torch.equal(contents(copied(tasks).sample(3, generator())), expected)
    batch = tasks.sample(3, generator())
    twin = copied(batch)
    assert torch.equal(contents(batch), expected)
    assert torch.equal(contents(twin), expected)


@every_own_row
def test_reprs_name_the_class_and_are_short(tasks: Any) -> None:
    for described in (tasks, tasks.split("test"), tasks.sample(8, generator())):
        text = repr(described)
        assert text.startswith(f"{type(described).__name__}(")
        assert len(text) < 250
        assert "tensor(" not in text


@every_own_row
def test_many_tasks_are_drawn_by_as_many_calls_as_few(tasks: Any) -> None:
    few, many = (count_calls(lambda n=n: tasks.sample(n, generator())) for n in (40, 200))
    assert 0 < few == many


@every_own_row
def test_bad_arguments_are_named(tasks: Any) -> None:
    for number in (0, -1):
        with pytest.raises(ValueError, match=f"num_tasks must be at least 1, got {number}"):
            tasks.sample(number, generator())
    with pytest.raises(ValueError, match="split must be one of train, valid, test, got 'all'"):
        tasks.split("all")
