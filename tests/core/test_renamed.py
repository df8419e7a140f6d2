"""Old names of arguments: they work, and warn at the caller's line."""

from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from metakern.core.renamed import renamed, with_new_names
from metakern.training import TrainerConfig


@renamed(rate="inner_rate")
def function(x, inner_rate=0.1):
    """Documented."""
    return x, inner_rate


class Kind:
    """A class whose constructor has a new name for an argument."""

    def __init__(self, inner_rate=0.1):
        self.inner_rate = inner_rate


Kind = renamed(rate="inner_rate")(Kind)


def test_an_old_name_is_taken_for_the_new_one():
    with pytest.warns(
        DeprecationWarning, match="rate is now inner_rate; the old name goes in the next release"
    ) as caught:
        assert function(1, rate=0.5) == (1, 0.5)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(DeprecationWarning, match="rate is now") as caught:
        made = Kind(rate=0.5)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(DeprecationWarning, match="Kind.rate is now inner_rate") as caught:
        assert made.rate == 0.5
    assert [warning.filename for warning in caught] == [__file__]


def test_new_names_warn_of_nothing(recwarn):
    assert function(1, inner_rate=0.5) == function(1, 0.5) == (1, 0.5)
    assert Kind(0.5).inner_rate == 0.5
    assert function.__doc__ == "Documented."
    assert not recwarn


def test_both_names_are_one_too_many():
    with pytest.raises(TypeError, match="rate is the old name of inner_rate: give one of them"):
        function(1, rate=0.5, inner_rate=0.5)
    with pytest.raises(TypeError, match="here: lr is the old name of outer_lr"):
        with_new_names({"lr": 1, "outer_lr": 1}, {"lr": "outer_lr"}, "here: ")


def test_the_trainer_configuration_takes_its_old_names():
    with pytest.warns(DeprecationWarning, match="is now") as caught:
        config = TrainerConfig(clip_norm=2.0, precision="bf16", accumulate=2)
    assert {warning.filename for warning in caught} == {__file__}
    assert config == TrainerConfig(max_grad_norm=2.0, mixed_precision="bf16", batch_parts=2)
    with pytest.warns(DeprecationWarning, match="TrainerConfig.clip_norm is now max_grad_norm"):
        assert config.clip_norm == 2.0
    assert config.batch_parts == 2
    assert asdict(config)["max_grad_norm"] == 2.0
    assert "clip_norm" not in asdict(config)
    assert replace(config, max_grad_norm=3.0).max_grad_norm == 3.0
    with pytest.raises(FrozenInstanceError):
        config.max_grad_norm = 1.0
