"""The held-out test tasks of the experiment. No choice is made on them; they are used for final figures alone.

Networks of sizes that no training or validation network has, on images of the test split, which no training or
validation task uses. Every task draws its images, their symmetry and the names of its classes from the generator.
"""

from __future__ import annotations

#: Networks: kind, size, activation. "regression-8" has the size of training, as 8×8 pixels leave it no other;
#: "regression-4" sees 4×4 pixels.
NETWORKS = (
    "regression-8",
    "regression-4",
    "mlp-12-sigmoid",
    "mlp-32-sigmoid",
    "cnn-4",
    "cnn-10",
    "rnn-12",
    "rnn-32",
)

#: Tasks of each network, the seed of their generator, and inner steps, as in training.
TASKS, SEED, STEPS = 8, 2 * 10**6, 100
