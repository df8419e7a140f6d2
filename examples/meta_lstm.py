"""Meta-LSTM (Ravi & Larochelle 2017): the initialisation and the update rule are learned together.

python examples/meta_lstm.py --iterations 300
"""

import argparse

import torch
import torch.nn.functional as F

from metakern.learners import MAMLLearner
from metakern.models import mlp
from metakern.rules import MetaLSTM
from metakern.tasks import Digits
from metakern.training import Trainer, TrainerConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=300)
    iterations = parser.parse_args().iterations

    torch.manual_seed(0)
    tasks = Digits(ways=5, support=5, query=15)
    model = mlp(64, 64, 5)
    rule = MetaLSTM.for_model(model)  # learns the initial parameters too
    learner = MAMLLearner(model, loss=F.cross_entropy, steps=5, rule=rule)
    optimizer = torch.optim.Adam(learner.parameters(), 1e-3)
    config = TrainerConfig(iterations=iterations, num_tasks=16, eval_every=50, eval_tasks=64, max_grad_norm=1.0)
    trainer = Trainer(learner, tasks, optimizer, config, folder="runs/meta-lstm")
    trainer.fit()
    trainer.load_best()
    print({name: round(value, 3) for name, value in trainer.evaluate("test").items()})


if __name__ == "__main__":
    main()
