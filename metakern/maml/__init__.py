"""The MAML family: per-task learners with learn2learn's API, and calls that adapt a whole meta-batch at once.

- MAML, FOMAML: Finn et al. 2017, arXiv 1703.03400
- Meta-SGD, one learned learning rate per parameter: Li et al. 2017, arXiv 1707.09835
- Reptile: Nichol et al. 2018, arXiv 1803.02999
- MAML++, learned learning rates per tensor and step (LSLR), multi-step loss (MSL), derivative-order annealing,
  per-step batch-norm statistics (:func:`per_step_batch_norm`): Antoniou et al. 2018, arXiv 1810.09502
- ANIL, only the head adapts: Raghu et al. 2019, arXiv 1909.09157
"""

import sys

from metakern.inner_loop.batch_norm import PerStepBatchNorm, per_step_batch_norm
from metakern.inner_loop.clone import clone_module, detach_module, maml_update, update_module
from metakern.maml.batched import (
    Adapted,
    Rates,
    adapt,
    meta_backward,
    meta_loss,
    multi_step_weights,
    reptile_step,
)
from metakern.maml.one_task import MAML, MetaSGD

#: Alias for learn2learn's module ``algorithms.maml``, with MAML and maml_update; ``algorithms`` is this package here.
maml = sys.modules[__name__]

__all__ = [
    "MAML",
    "Adapted",
    "MetaSGD",
    "PerStepBatchNorm",
    "Rates",
    "adapt",
    "clone_module",
    "detach_module",
    "maml",
    "maml_update",
    "meta_backward",
    "meta_loss",
    "multi_step_weights",
    "per_step_batch_norm",
    "reptile_step",
    "update_module",
]


def __dir__() -> list[str]:
    return list(__all__)
