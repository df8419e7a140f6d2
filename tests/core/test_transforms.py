"""Detection of torch transforms around a call."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metakern.core.transforms import is_batched, is_transformed, is_transformed_or_dual, levels, wants_gradient


def test_nothing_is_at_work_around_a_plain_call() -> None:
    assert not is_transformed()
    assert not is_transformed_or_dual()
    assert not wants_gradient(torch.ones(2))
    assert wants_gradient(torch.ones(2, requires_grad=True))
    assert not is_batched(torch.ones(2))
    assert not list(levels(torch.ones(2)))


def test_dual_numbers_are_no_transform() -> None:
    with forward_ad.dual_level():
        assert not is_transformed()
        assert is_transformed_or_dual()
    assert not is_transformed_or_dual()


def test_torch_func_is_seen_and_looked_through() -> None:
    seen: list[tuple[bool, ...]] = []

    def record(x: Tensor) -> Tensor:
        seen.append((is_transformed(), is_transformed_or_dual(), is_batched(x), wants_gradient(x)))
        return x.sum()

    torch.func.vmap(record)(torch.ones(2, 3))
    torch.func.vmap(record)(torch.ones(2, 3, requires_grad=True))
    torch.func.grad(record)(torch.ones(3))
    torch.func.vmap(torch.func.grad(record))(torch.ones(2, 3))
    batched, recorded = (True, True, True, False), (True, True, True, True)
    assert seen == [batched, recorded, (True, True, False, True), recorded]


def test_a_compiled_function_is_transformed() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: Tensor) -> Tensor:
        return x + 1 if is_transformed() and is_transformed_or_dual() and not wants_gradient(x) else x

    assert compiled(torch.zeros(())).item() == 1
