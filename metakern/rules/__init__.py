"""Update rules: modules that turn parameters, gradients and a state into new parameters and a new state."""

from metakern.rules.lstm import CoordinatewiseLSTM
from metakern.rules.pretrained import PretrainedRule, load
from metakern.rules.protocol import Rule, RuleState
from metakern.rules.registry import get, register

register(CoordinatewiseLSTM)

__all__ = ["CoordinatewiseLSTM", "PretrainedRule", "Rule", "RuleState", "get", "load", "register"]
