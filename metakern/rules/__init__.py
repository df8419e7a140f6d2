"""Update rules: modules that map parameters, gradients and a state to new parameters and a new state."""

from metakern.rules.adam import Adam
from metakern.rules.gradient_descent import GradientDescent
from metakern.rules.hierarchical_rnn import HierarchicalRNN
from metakern.rules.lstm import CoordinatewiseLSTM
from metakern.rules.momentum import Momentum
from metakern.rules.pretrained import PretrainedRule, load
from metakern.rules.protocol import Rule, RuleState
from metakern.rules.registry import get, register

register(Adam)
register(CoordinatewiseLSTM)
register(GradientDescent)
register(HierarchicalRNN)
register(Momentum)

__all__ = [
    "Adam",
    "CoordinatewiseLSTM",
    "GradientDescent",
    "HierarchicalRNN",
    "Momentum",
    "PretrainedRule",
    "Rule",
    "RuleState",
    "get",
    "load",
    "register",
]
