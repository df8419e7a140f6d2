"""The inner-loop benchmark runs, compares equal work, reports its measurements. No test depends on timings."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode

from bench.mlp_inner_loop import compare
from bench.mlp_inner_loop.cases import MINI_IMAGENET_CONV4, OMNIGLOT_CONV4, Case, embedding, sinusoid
from bench.mlp_inner_loop.contenders import AGREEMENT, check_agreement, iterate, make_contender
from bench.mlp_inner_loop.targets import INNER_LOOP_SPEEDUPS, judge_inner_loop
from bench.peers import LIBRARIES, find_libraries
from bench.processes import in_subprocess
from tests.bench.bench_runs import run_quick

SMALL = replace(sinusoid(2, 2), shape=(3,), widths=(4, 4, 1), support=5, query=6)
CLASSES = replace(embedding(2, 2), shape=(3,), widths=(4, 5))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of ``python -m bench.mlp_inner_loop.compare --quick``."""
    return run_quick("mlp_inner_loop.compare", tmp_path_factory.mktemp("bench"), "one meta-iteration")


def test_quick_comparison_writes_everything(quick: Path) -> None:
    results = json.loads(quick.read_text())
    assert results["benchmark"] == "mlp_inner_loop"
    assert results["command"].startswith("python -m bench.mlp_inner_loop.compare --quick --threads 1")
    assert set(results["machine"]) >= {"cpu", "threads", "versions", "date"}
    assert set(results["libraries"]) == set(LIBRARIES)
    plan = compare.QUICK
    assert [cell["title"] for cell in results["cells"]] == [case.title for case, _ in plan.cells]
    cells = [*results["cells"], results["adapt"]]
    for cell, names in zip(cells, [*(names for _, names in plan.cells), compare.LEARNERS], strict=True):
        assert {*cell["contenders"], *cell["absent"]} == set(names)
        ours, *peers = (time["median_s"] for time in cell["contenders"].values())
        assert list(cell["speedup"].values()) == pytest.approx([peer / ours for peer in peers])
        assert cell["gflops_per_second"] == pytest.approx(cell["flops"] / ours / 1e9)
        assert cell["share_of_sgemm"] == pytest.approx(cell["gflops_per_second"] / results["sgemm_gflops"])
        assert cell["max_relative_difference_float64"] < AGREEMENT
    assert set(results["cells"][0]["first_result_s"]) == {"metakern", "metakern, autograd", "vmap"}
    (memory,) = results["memory"]
    assert list(memory["contenders"]) == list(plan.memory_names)
    assert [target["name"].split(",")[0] for target in results["targets"]] == ["MAML.adapt on one task"]


def test_some_of_the_cases() -> None:
    plan = compare.with_cases(compare.FULL, "K = 5, first order")
    assert [case.title for case, _ in plan.cells] == [sinusoid(first_order=True).title]
    assert plan.memory_tasks == ()
    with pytest.raises(typer.BadParameter, match="must be part of a title, got 'K = 7'; there are: sinusoid"):
        compare.with_cases(plan, "K = 7")
    with pytest.raises(typer.BadParameter, match="--cases needs --output"):
        compare.main(cases="K = 5")


PLAIN = ("metakern", "metakern, checkpoints", "metakern.MAML", "vmap", "loop")


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("case", [SMALL, CLASSES], ids=lambda case: case.name)
def test_all_contenders_agree(case: Case, first_order: bool) -> None:
    case = replace(case, first_order=first_order)
    made = {name: make_contender(name, case, {}) for name in PLAIN}
    contenders = {name: contender for name, contender in made.items() if contender is not None}
    assert list(contenders) == list(PLAIN)
    assert check_agreement(contenders, [case.batch(0), case.batch(1)]) < AGREEMENT


@pytest.mark.parametrize("first_order", [False, True])
def test_the_compiled_contender_agrees(first_order: bool) -> None:
    torch._dynamo.reset()
    case = replace(SMALL, steps=1, first_order=first_order)
    pair = {name: make_contender(name, case, {}) for name in ("metakern", "compiled")}
    assert check_agreement({n: c for n, c in pair.items() if c is not None}, [case.batch(0)]) < AGREEMENT
    assert pair["compiled"] is not None


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_agrees(name: str, first_order: bool) -> None:
    libraries, notes = find_libraries()
    if name not in libraries:
        pytest.skip(f"{name} is no requirement of the benchmark: {notes[name]}")
    case = replace(SMALL, first_order=first_order)
    peer, ours = make_contender(name, case, libraries), make_contender("metakern", case, {})
    assert ours is not None
    if name == "torchopt" and first_order:
        assert peer is None
        return
    assert peer is not None
    assert check_agreement({"metakern": ours, name: peer}, [case.batch(0), case.batch(1)]) < AGREEMENT


def test_disagreement_is_noticed() -> None:
    ours = make_contender("metakern", SMALL, {})
    wrong = make_contender("loop", replace(SMALL, first_order=True, lr=0.1), {})
    assert ours is not None
    assert wrong is not None
    with pytest.raises(AssertionError, match=r"wrong and metakern differ by .* in result 0"):
        check_agreement({"metakern": ours, "wrong": wrong}, [SMALL.batch(0)])


def test_a_meta_iteration_leaves_its_own_gradients_alone() -> None:
    """A second one does not accumulate onto the first's gradients."""
    for name in PLAIN:
        contender = make_contender(name, SMALL, {})
        assert contender is not None
        batch = SMALL.batch(0)
        grads = []
        for _ in range(2):
            iterate(contender, batch)
            grads.append([p.grad.clone() for p in contender.model.parameters() if p.grad is not None])
        assert len(grads[0]) == 6
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)), name


@pytest.mark.parametrize("first_order", [False, True])
def test_the_flops_are_those_of_the_products(first_order: bool) -> None:
    """Counted by hand for the MLP; PyTorch counts less, as the first layer's input has no gradient."""
    case = sinusoid(2, 3, first_order=first_order)
    forwards = 10 * 3 * (3 if first_order else 9) + 3 * 10
    assert case.flops() == 2 * forwards * 2 * (40 + 40 * 40 + 40)
    deep = replace(case, shape=(16,), widths=(16,) * 9 + (1,))
    contender = make_contender("loop", deep, {})
    assert contender is not None
    with FlopCounterMode(display=False) as counter:
        iterate(contender, deep.batch(0))
    assert 0.85 < counter.get_total_flops() / deep.flops() < 1


def test_the_models_are_those_of_the_papers() -> None:
    """Parameter counts: conv4's four norms have two vectors each, its convolutions no bias."""
    assert sum(p.numel() for p in sinusoid().model().parameters()) == 80 + 1640 + 41
    omniglot, mini = OMNIGLOT_CONV4.model(), MINI_IMAGENET_CONV4.model()
    assert sum(p.numel() for p in omniglot.parameters()) == 9 * 64 + 3 * 9 * 64 * 64 + 4 * 128 + 64 * 5 + 5
    assert sum(p.numel() for p in mini.parameters()) == 27 * 32 + 3 * 9 * 32 * 32 + 4 * 64 + 800 * 5 + 5


@pytest.fixture
def two_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fake learn2learn 7.8, a higher that fails to import, no torchopt."""
    (tmp_path / "learn2learn.py").write_text("__version__ = '7.8'\n")
    (tmp_path / "higher.py").write_text("raise OSError('built for another torch')\n")
    for name in LIBRARIES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchopt" else find_spec(name))
    yield
    for name in LIBRARIES:
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("two_libraries")
def test_a_library_that_is_not_there_is_named_with_the_reason() -> None:
    libraries, notes = find_libraries()
    assert list(libraries) == ["learn2learn"]
    assert notes == {
        "learn2learn": "7.8",
        "higher": "not importable: OSError: built for another torch",
        "torchopt": "not importable: not installed",
    }
    assert make_contender("higher", SMALL, libraries) is None


def test_checkpoints_halve_the_memory_of_a_long_inner_loop() -> None:
    """Memory, unlike time, can be tested: each peak is measured in a separate process."""
    names = ("metakern, checkpoints", "metakern")
    few, all_steps = (in_subprocess("bench.mlp_inner_loop.memory", name, 8, 40, 0)["peak_bytes"] for name in names)
    assert few <= all_steps / 2


def test_targets_are_judged_as_met_or_missed() -> None:
    speedups = {title: {"compiled": 2.0, "loop": 59.9} for _, title, *_ in INNER_LOOP_SPEEDUPS}
    cells = [{"title": title, "speedup": speedup} for title, speedup in speedups.items()]
    adapt = {"speedup": {"learn2learn": 1.0, "loop": 0.9}}
    targets = judge_inner_loop({"cells": cells, "adapt": adapt})
    assert [(t["kind"], t["name"].rsplit(" ", 1)[1], t["required"], t["met"]) for t in targets] == [
        ("must", "compiled", 2.0, True),
        ("must", "loop", 60.0, False),
        ("aim", "compiled", 4.0, False),
    ] * 2 + [
        ("must", "compiled", 1.5, True),
        ("aim", "compiled", 3.0, False),
        ("must", "learn2learn", 1.0, True),
    ]
    without = judge_inner_loop({"cells": [], "adapt": {"speedup": {"loop": 0.9}}})
    assert [(t["name"], t["met"]) for t in without] == [("MAML.adapt on one task, against loop", False)]


def test_every_target_has_its_case_in_the_full_run() -> None:
    measured = {(case.title, name) for case, names in compare.FULL.cells for name in names}
    assert {(title, peer) for _, title, peer, _ in INNER_LOOP_SPEEDUPS} <= measured
