"""The plain peer computes the same as the fused rule, as a speed-up over it requires."""

import pytest
import torch

from metakern.rules import CoordinatewiseLSTM
from metakern.rules.plain_lstm import PlainLSTM


@pytest.mark.parametrize("preprocess", ["none", "log_sign", "log_and_clip"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_three_steps_equal_the_fused_rule(preprocess, num_layers):
    torch.manual_seed(0)
    rule = CoordinatewiseLSTM(7, num_layers, preprocess=preprocess)
    plain = PlainLSTM(rule)
    trees = []
    for each in (rule, plain):
        generator = torch.Generator().manual_seed(1)
        params = {"w": torch.ones(5, 3), "b": [torch.zeros(4)]}
        state = each.init_state(params)
        for _ in range(3):
            grads = {"w": torch.randn(5, 3, generator=generator), "b": [torch.randn(4, generator=generator)]}
            params, state = each(params, grads, state)
        trees.append(params)
    torch.testing.assert_close(trees[0], trees[1])


def test_weights_come_in_the_same_order():
    rule = CoordinatewiseLSTM(3)
    for fused, plain in zip(rule.parameters(), PlainLSTM(rule).parameters(), strict=True):
        assert torch.equal(fused, plain)
