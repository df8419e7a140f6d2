"""Update rules: modules that map parameters, gradients and a state to new parameters and a new state."""

from metakern.rules.adam import Adam
from metakern.rules.gradient_descent import GradientDescent
from metakern.rules.lstm import CoordinatewiseLSTM
from metakern.rules.momentum import Momentum
from metakern.rules.pretrained import PretrainedRule, load
from metakern.rules.protocol import Rule, RuleState
from metakern.rules.registry import add_variant, get, make, names, register

register(Adam)
register(CoordinatewiseLSTM)
register(GradientDescent)
register(Momentum)

add_variant("sgd", GradientDescent)
add_variant("meta-sgd", GradientDescent.meta_sgd, needs_params=True)
add_variant("lslr", GradientDescent.lslr, needs_params=True)

__all__ = [
    "Adam",
    "CoordinatewiseLSTM",
    "GradientDescent",
    "Momentum",
    "PretrainedRule",
    "Rule",
    "RuleState",
    "get",
    "load",
    "make",
    "names",
    "register",
]
