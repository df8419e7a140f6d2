"""Meta-learners for the trainer."""

from metakern.learners.maml import MAMLLearner
from metakern.learners.protocol import MetaLearner

__all__ = ["MAMLLearner", "MetaLearner"]
