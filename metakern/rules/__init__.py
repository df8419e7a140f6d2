"""Update rules: modules that map parameters, gradients and a state to new parameters and a new state."""

from metakern.rules.adam import Adam
from metakern.rules.gradient_descent import GradientDescent
from metakern.rules.guided_adam import GuidedAdam
from metakern.rules.hierarchical_rnn import HierarchicalRNN
from metakern.rules.lstm import CoordinatewiseLSTM
from metakern.rules.meta_lstm import MetaLSTM
from metakern.rules.momentum import Momentum
from metakern.rules.per_parameter_mlp import PerParameterMLP
from metakern.rules.pretrained import PretrainedRule, load, pretrained
from metakern.rules.protocol import Rule, RuleState
from metakern.rules.registry import add_variant, get, make, names, register
from metakern.rules.rnnprop import RNNProp

register(Adam)
register(CoordinatewiseLSTM)
register(GradientDescent)
register(GuidedAdam)
register(MetaLSTM)
register(HierarchicalRNN)
register(Momentum)
register(RNNProp)
register(PerParameterMLP)

add_variant("sgd", GradientDescent)
add_variant("meta-sgd", GradientDescent.meta_sgd, needs_params=True)
add_variant("small-fc-lopt", PerParameterMLP.small_fc_lopt)
add_variant("mulo", PerParameterMLP.mulo)
add_variant("elo", PerParameterMLP.elo)
add_variant("lslr", GradientDescent.lslr, needs_params=True)
add_variant("rnnprop", RNNProp)
add_variant("meta-lstm-with-start", MetaLSTM, needs_params=True)

__all__ = [
    "Adam",
    "CoordinatewiseLSTM",
    "GradientDescent",
    "GuidedAdam",
    "HierarchicalRNN",
    "MetaLSTM",
    "Momentum",
    "PerParameterMLP",
    "PretrainedRule",
    "RNNProp",
    "Rule",
    "RuleState",
    "get",
    "load",
    "make",
    "names",
    "pretrained",
    "register",
]
