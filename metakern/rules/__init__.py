"""Update rules: modules that turn parameters, gradients and a state into new parameters and a new state."""

from metakern.rules.lstm import CoordinatewiseLSTM
from metakern.rules.protocol import Rule, RuleState

__all__ = ["CoordinatewiseLSTM", "Rule", "RuleState"]
