"""One-task learners that cannot adapt: each raises with the reason; permitted uses keep working; memory of clones."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metakern import MAML, MetaSGD
from tests.conftest import assert_same_bits
from tests.inner_loops import mlp
from tests.maml.test_maml_references import Net
from tests.maml.test_maml_references import doubles as doubles  # a fixture

# -------------------------------------------------------------------------------------- references that are not rebound


class Helper:
    """Not a module, list or function, so cloning does not inspect it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x)


class ByHelper(Net):
    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper(self.body)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.helper(x).tanh())


class ByHelperToo(ByHelper):
    """Every parameter receives a gradient through the clone, and the body another one that bypasses it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.body(x) + self.helper(x)).tanh())


_KEPT: dict[str, Any] = {}


class ByGlobal(Net):
    def __init__(self) -> None:
        super().__init__()
        _KEPT["body"] = self.body.forward
        self.f = lambda x: _KEPT["body"](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(x).tanh())


@pytest.mark.parametrize("allow_unused", [False, True])
@pytest.mark.parametrize(
    ("make", "where"),
    [(ByHelper, "'helper' (Helper)"), (ByHelperToo, "'helper' (Helper)"), (ByGlobal, "'f' (a function)")],
)
def test_a_clone_that_computes_with_the_original_says_so(make: type[Net], where: str, allow_unused: bool) -> None:
    for kind in (functools.partial(MAML, allow_unused=allow_unused), MetaSGD):
        learner = kind(make(), 0.1)
        for again in (learner.clone(), learner.clone().clone()):
            with pytest.raises(RuntimeError) as caught:
                again(torch.ones(3, 2))
            message = str(caught.value)
            assert "takes ['body.bias', 'body.weight'] from the model that it was cloned from" in message
            assert "allow_unused" not in message
        with pytest.raises(RuntimeError) as caught:
            learner.clone()(torch.ones(3, 2))
        assert where in str(caught.value)


@pytest.mark.parametrize("allow_unused", [False, True])
def test_a_loss_that_passes_the_clone_by_is_refused(allow_unused: bool) -> None:
    """The loss uses a method of the module, whose result the learner does not see."""
    net = ByHelper()
    net.features = None
    learner = MAML(net, 0.1, allow_unused=allow_unused).clone()
    loss = learner.head(learner.helper(torch.ones(3, 2))).sum()
    with pytest.raises(RuntimeError, match=r"must depend on the clone's own \['body.bias', 'body.weight'\]") as caught:
        learner.adapt(loss)
    assert "'helper' (Helper) refers to module 'body' of the original" in str(caught.value)
    assert "allow_unused" not in str(caught.value)


@pytest.mark.parametrize("kind", [MAML, MetaSGD])
def test_losses_that_reach_no_parameter(kind: type) -> None:
    net, x = Net(), torch.ones(3, 2)
    options = {"allow_unused": True} if kind is MAML else {}
    learner = kind(net, 0.1, **options).clone()
    with pytest.raises(RuntimeError, match="computed with the model that the learner was cloned from; compute it with"):
        learner.adapt(net(x).sum())
    loss = learner(x).sum()
    learner.adapt(loss)
    with pytest.raises(RuntimeError, match=r"computed before the last adapt\(\)"):
        learner.adapt(loss)
    with pytest.raises(RuntimeError, match=r"on none it does: compute it with the learner") as caught:
        learner.adapt(torch.ones((), requires_grad=True) * 2)
    assert "allow_unused" not in str(caught.value)


def test_modules_in_a_plain_list_alone() -> None:
    class Unregistered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(2, 3), nn.Linear(3, 1)]

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](x).tanh())

    for learner in (MAML(Unregistered(), 0.1, allow_unused=True).clone(), MetaSGD(Unregistered(), 0.1)):
        with pytest.raises(RuntimeError, match=r"must have a parameter to adapt, got none; those in \['layers'\]"):
            learner.adapt(learner(torch.ones(3, 2)).sum())


def test_modules_in_a_plain_list_beside_registered_ones() -> None:
    class Partly(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = [nn.Linear(3, 3)]
            self.teacher = [nn.Linear(2, 1)]

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                offset = self.teacher[0](x)
            return self.head(self.extra[0](self.body(x))) + offset

    maml = MAML(Partly(), 0.1)
    learner = maml.clone()
    with pytest.warns(UserWarning, match=r"parameters in \['extra'\] are not registered") as seen:
        loss = learner(torch.ones(3, 2)).sum()
    assert [w.filename for w in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        learner.adapt(loss)
        learner(torch.ones(3, 2))
        maml.clone()(torch.ones(3, 2))


# ------------------------------------------------------------------------------------------- what is the caller's to do


def test_terms_and_inputs_of_the_callers_may_depend_on_the_original() -> None:
    net, x = Net(), torch.randn(4, 2)
    maml = MAML(net, 0.1)
    learner = maml.clone()
    distance = sum((p - q).square().sum() for p, q in zip(learner.parameters(), maml.parameters(), strict=True))
    learner.adapt(learner(x).square().mean() + distance)  # a proximal term
    given = x @ net.body.weight.t() @ net.body.weight
    learner.adapt(learner(given).square().mean())
    learner(net.body.weight[:2])
    learner(nn.Parameter(torch.ones(1, 2)))


def test_state_that_a_model_keeps_between_calls() -> None:
    class Recurrent(Net):
        def __init__(self) -> None:
            super().__init__()
            self.h: Tensor | float = 0.0

        def forward(self, x: Tensor) -> Tensor:
            self.h = (self.body(x) + self.h).tanh()
            return self.head(self.h)

    net, x = Recurrent(), torch.randn(4, 2)
    net(x)  # leaves a tensor that depends on the original
    learner = MAML(net, 0.1).clone()
    for _ in range(3):
        learner.adapt(learner(x).square().mean())
    learner.clone().clone()(x).sum().backward()
    assert net.body.weight.grad is not None


def test_objects_with_tensors_are_looked_into() -> None:
    class Distribution(ByHelper):
        def forward(self, x: Tensor) -> torch.distributions.Normal:
            return torch.distributions.Normal(super().forward(x), 1.0)

    with pytest.raises(RuntimeError, match="must compute with its own parameters"):
        MAML(Distribution(), 0.1).clone()(torch.ones(3, 2))


# ---------------------------------------------------------------------------------------------- modes without gradients


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"allow_nograd": True}, {"allow_unused": True}])
def test_adapting_without_gradients_says_so(mode: Callable[[], Any], options: dict[str, bool]) -> None:
    maml, x = MAML(Net(), 0.1, **options), torch.randn(4, 2)
    with mode():
        learner = maml.clone()
        with pytest.raises(RuntimeError, match=r"which torch.no_grad\(\) and .* forbid") as caught:
            learner.adapt(learner(x).sum())
    assert "allow_nograd" not in str(caught.value)
    learner = maml.clone()
    with mode(), pytest.raises(RuntimeError, match=r"which torch.no_grad\(\) and .* forbid"):
        learner.adapt(learner(x).sum())
    with torch.no_grad():
        lost = maml.clone()
    with pytest.raises(RuntimeError, match=r"clone\(\), the forward pass and adapt\(\) take gradients"):
        lost.adapt(lost(x.requires_grad_()).sum())


def test_a_learner_adapts_within_enable_grad() -> None:
    net, x = Net(), torch.randn(4, 2)
    with torch.no_grad(), torch.enable_grad():
        learner = MAML(net, 0.1).clone()
        learner.adapt(learner(x).sum())
    with torch.no_grad():
        assert not learner(x).requires_grad
    assert not torch.equal(learner.module.head.bias, net.head.bias)


# -------------------------------------------------------------------------------------------------------------- memory


def test_clones_are_freed_without_a_collection() -> None:
    maml, x = MAML(mlp(2, 4, 1), 0.1), torch.randn(4, 2)
    gc.disable()
    try:
        learner = maml.clone()
        learner.adapt(learner(x).sum())
        again = learner.clone()
        again(x).sum().backward()
        alive = [weakref.ref(p) for one in (learner, again) for p in one.parameters()]
        del learner, again
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()


def test_a_detached_clone_lets_its_past_go() -> None:
    net = mlp(2, 4, 1)
    learner = MAML(net, 0.1).clone()
    for _ in range(3):
        learner.adapt(learner(torch.ones(3, 2)).sum())
        for p in learner.parameters():
            p.detach_().requires_grad_()
        learner = learner.clone()
    assert len(learner._lineage.origins) == 4


def test_learners_with_a_past_can_be_copied() -> None:
    maml = MAML(Net(), 0.1)
    learner = maml.clone()
    learner.adapt(learner(torch.ones(3, 2)).sum())
    for p in learner.parameters():
        p.detach_().requires_grad_()
    twin = copy.deepcopy(learner)
    assert_same_bits("output", twin(torch.ones(3, 2)).detach(), learner(torch.ones(3, 2)).detach())
    twin.adapt(twin(torch.ones(3, 2)).sum())
