"""Few-shot classification by Conv4 on images from several domains, with a learner for every cluster of tasks.

python examples/conv4_clusters.py --iterations 300
"""

import argparse

import torch
import torch.nn.functional as F

from metakern.learners import ClusteredLearner, MAMLLearner
from metakern.models import conv4
from metakern.tasks import FewShotEpisodes
from metakern.tasks.digits import all_digits, invert
from metakern.training import Trainer, TrainerConfig


def classes() -> dict[str, list[torch.Tensor]]:
    """Digits under four rotations as classes, 16x16 pixels; replace it by your own images [n, channels, H, W]."""
    images, labels = all_digits()
    images = F.interpolate(images.unsqueeze(1), scale_factor=2)
    digits = {"train": (0, 1, 5, 6, 8, 9), "valid": (2, 3), "test": (4, 7)}
    return {
        split: [images[labels == digit].rot90(turns, (-2, -1)) for digit in of for turns in range(4)]
        for split, of in digits.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=300)
    iterations = parser.parse_args().iterations

    tasks = FewShotEpisodes(classes(), ways=5, support=1, query=5, domains=[torch.clone, invert])
    model = conv4((1, 16, 16), filters=16, outputs=5)
    learner = MAMLLearner(model, loss=F.cross_entropy, steps=3, inner_lr=0.1)
    third = max(1, iterations // 3)
    clustered = ClusteredLearner(learner, 2, warmup=third, begin=third, pool=32, eval_temperature=0.15)
    config = TrainerConfig(iterations=iterations, num_tasks=4, eval_every=50, eval_tasks=16, monitor="accuracy")
    optimizer = torch.optim.Adam(clustered.parameters(), 1e-3)
    trainer = Trainer(clustered, tasks, optimizer, config, folder="runs/conv4-clusters")
    trainer.resume(required=False)  # goes on where an earlier start was stopped
    trainer.fit()
    trainer.load_best()
    measures = trainer.evaluate("test")
    print(f"test accuracy {measures['accuracy']:.3f}; shares of the clusters {clustered.occupancy.tolist()}")


if __name__ == "__main__":
    main()
