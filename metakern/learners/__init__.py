"""Meta-learners for the trainer."""

from metakern.learners.clustered import ClusteredLearner
from metakern.learners.maml import MAMLLearner
from metakern.learners.protocol import MetaLearner
from metakern.learners.rule import RuleLearner
from metakern.learners.scaled import ScaledRuleLearner

__all__ = ["ClusteredLearner", "MAMLLearner", "MetaLearner", "RuleLearner", "ScaledRuleLearner"]
