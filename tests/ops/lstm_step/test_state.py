"""LSTMState, pack_state and unpack_state: the layout, its gradients, and what is refused."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from metakern.ops import LSTMState, pack_state, unpack_state
from metakern.ops.lstm_step.state import LAYOUT, TILE_LANES
from tests.conftest import assert_same_bits

TAILS = (0, 1, 15, 16, 17, 31, 32, 33, 1023, 1025)


def random_state(n: int, hidden: int = 5, layers: int = 2, dtype: torch.dtype = torch.float32) -> tuple:
    return torch.randn(layers, n, hidden, dtype=dtype), torch.randn(layers, n, hidden, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", TAILS)
def test_unpack_gives_back_what_was_packed(n: int, dtype: torch.dtype) -> None:
    h, c = random_state(n, dtype=dtype)
    state = pack_state(h, c)
    assert (state.num_coordinates, state.hidden_size, state.num_layers, state.layout) == (n, 5, 2, LAYOUT)
    assert state.data.is_contiguous()
    for name, got, expected in zip("hc", unpack_state(state), (h, c), strict=True):
        assert_same_bits(name, got, expected)


def test_where_each_number_lies() -> None:
    # [tile, layer, h or c, unit, lane], and zeros behind the last coordinate.
    n = 70
    h, c = random_state(n)
    data = pack_state(h, c).data
    assert list(data.shape) == [3, 2, 2, 5, TILE_LANES]
    for layer, coordinate, unit in ((0, 0, 0), (1, 31, 4), (0, 32, 2), (1, 69, 3)):
        tile, lane = divmod(coordinate, TILE_LANES)
        assert data[tile, layer, 0, unit, lane] == h[layer, coordinate, unit]
        assert data[tile, layer, 1, unit, lane] == c[layer, coordinate, unit]
    assert not data[2, ..., 70 - 64 :].any()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 200), hidden=st.integers(1, 64), layers=st.integers(1, 3), axes=st.permutations(range(3)))
def test_round_trip_of_any_size_and_strides(n: int, hidden: int, layers: int, axes: list[int]) -> None:
    inverse = [axes.index(i) for i in range(3)]
    h, c = (x.permute(axes).contiguous().permute(inverse) for x in random_state(n, hidden, layers))
    for name, got, expected in zip("hc", unpack_state(pack_state(h, c)), (h, c), strict=True):
        assert_same_bits(name, got, expected)


def test_packing_and_unpacking_pass_gradients() -> None:
    h, c = (x.requires_grad_() for x in random_state(33, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda h, c: unpack_state(pack_state(h, c)), (h[:, :3], c[:, :3]))
    weight = torch.randn(2, 33, 5, dtype=torch.float64)
    new_h, new_c = unpack_state(pack_state(h, c))
    (new_h * weight).sum().backward(retain_graph=True)
    assert_same_bits("gradient of h", h.grad, weight)
    assert not c.grad.any()
    (new_c * weight).sum().backward()
    assert_same_bits("gradient of c", c.grad, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zeros_is_the_packed_zero_state(dtype: torch.dtype) -> None:
    for n in TAILS:
        state = LSTMState.zeros(n, hidden_size=7, num_layers=3, dtype=dtype)
        packed = pack_state(torch.zeros(3, n, 7, dtype=dtype), torch.zeros(3, n, 7, dtype=dtype))
        assert_same_bits("zeros", state.data, packed.data)
        assert state.num_coordinates == n


def test_defaults_of_zeros() -> None:
    state = LSTMState.zeros(3)
    assert (state.hidden_size, state.num_layers, state.data.dtype) == (20, 2, torch.float32)
    assert LSTMState.zeros(3, device="meta").data.is_meta


def test_detach_clone_and_to() -> None:
    h, c = (x.requires_grad_() for x in random_state(33))
    state = pack_state(h, c)
    assert state.data.requires_grad
    detached = state.detach()
    assert not detached.data.requires_grad
    assert detached.data.data_ptr() == state.data.data_ptr()
    copied = detached.clone()
    copied.data.zero_()
    assert detached.data.any()
    wide = state.to(torch.float64)
    assert wide.data.dtype == torch.float64
    assert {x.num_coordinates for x in (detached, copied, wide)} == {33}


def test_a_state_is_a_pytree_and_can_be_copied_and_pickled() -> None:
    state = pack_state(*random_state(33))
    leaves, structure = pytree.tree_flatten({"state": state})
    assert len(leaves) == 1
    back = pytree.tree_unflatten([leaves[0] * 2], structure)["state"]
    assert_same_bits("doubled", back.data, state.data * 2)
    assert (back.num_coordinates, back.layout) == (33, LAYOUT)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert_same_bits("copy", other.data, state.data)
        assert (other.num_coordinates, other.layout) == (33, LAYOUT)


def test_a_state_cannot_be_changed_by_assignment() -> None:
    with pytest.raises(AttributeError):
        LSTMState.zeros(3).num_coordinates = 4


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"num_coordinates": -1}, ValueError, "N must be at least 0, got -1"),
        ({"num_coordinates": 3.0}, TypeError, "N must be an integer, got 3.0 of type float"),
        ({"num_coordinates": "3"}, TypeError, "N must be an integer, got '3' of type str"),
        ({"num_coordinates": True}, TypeError, "N must be an integer, got True of type bool"),
        ({"num_coordinates": None}, TypeError, "N must be an integer, got None of type NoneType"),
        ({"hidden_size": 0}, ValueError, "hidden_size must be 1 to 64, got 0"),
        ({"hidden_size": 65}, ValueError, "hidden_size must be 1 to 64, got 65"),
        ({"hidden_size": 20.0}, TypeError, "hidden_size must be an integer, got 20.0 of type float"),
        ({"num_layers": 0}, ValueError, "num_layers must be 1 to 3, got 0"),
        ({"num_layers": 4}, ValueError, "num_layers must be 1 to 3, got 4"),
        ({"num_layers": False}, TypeError, "num_layers must be an integer, got False of type bool"),
    ],
)
def test_zeros_refuses_sizes(sizes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        LSTMState.zeros(**({"num_coordinates": 3} | sizes))


@pytest.mark.parametrize(
    ("h", "c", "error", "message"),
    [
        ((2, 3, 5), (2, 4, 5), ValueError, "h and c must both have shape [L, N, H], got [2, 3, 5] and [2, 4, 5]"),
        ((3, 5), (3, 5), ValueError, "h and c must both have shape [L, N, H], got [3, 5] and [3, 5]"),
        ((4, 3, 5), (4, 3, 5), ValueError, "num_layers must be 1 to 3, got 4"),
        ((0, 3, 5), (0, 3, 5), ValueError, "num_layers must be 1 to 3, got 0"),
        ((2, 3, 65), (2, 3, 65), ValueError, "hidden_size must be 1 to 64, got 65"),
        ((2, 3, 0), (2, 3, 0), ValueError, "hidden_size must be 1 to 64, got 0"),
    ],
)
def test_pack_refuses_shapes(h: tuple, c: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        pack_state(torch.zeros(h), torch.zeros(c))


@pytest.mark.parametrize(
    ("h", "c"),
    [(torch.float32, torch.float64), (torch.float16, torch.float16), (torch.int64, torch.int64)],
)
def test_pack_refuses_dtypes(h: torch.dtype, c: torch.dtype) -> None:
    message = f"h and c must both be float32, float64 or bfloat16, got {h} and {c}"
    with pytest.raises(TypeError, match=re.escape(message)):
        pack_state(torch.zeros(1, 2, 3, dtype=h), torch.zeros(1, 2, 3, dtype=c))


def test_pack_refuses_tensors_of_two_devices() -> None:
    with pytest.raises(RuntimeError, match=r"h and c must be on one device, got cpu and meta"):
        pack_state(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, device="meta"))


def test_unpack_refuses_what_is_not_a_state_of_this_version() -> None:
    good = LSTMState.zeros(33)
    with pytest.raises(TypeError, match="state must be an LSTMState as pack_state makes it, got Tensor"):
        unpack_state(good.data)
    with pytest.raises(ValueError, match="state has layout version 2, this metakern reads version 1"):
        unpack_state(LSTMState(good.data, 33, layout=2))
    for data, n in ((good.data, 65), (good.data, 32), (good.data[..., :16], 33), (good.data[0], 33)):
        expected = f"state.data must have shape [{-(-n // 32)}, L, 2, H, 32] for N = {n}, got {list(data.shape)}"
        with pytest.raises(ValueError, match=re.escape(expected)):
            unpack_state(LSTMState(data, n))
