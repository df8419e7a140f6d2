"""MAML on sinusoids, one task at a time with learn2learn's calls, then all tasks of a meta-batch at once.

python examples/maml_sinusoids.py --iterations 200
"""

import argparse
import time

import torch
import torch.nn.functional as F

import metakern
from metakern.models import mlp
from metakern.tasks import Sinusoid


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=200)
    iterations = parser.parse_args().iterations
    tasks = Sinusoid(support=5, query=5, noise=0.0)

    def train(meta_gradients) -> None:
        torch.manual_seed(0)
        net, generator = mlp(1, 40, 40, 1), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(net.parameters(), 1e-3)
        begin = time.perf_counter()
        for _ in range(iterations):
            optimizer.zero_grad()
            losses = meta_gradients(net, tasks.sample(25, generator))
            optimizer.step()
        seconds = time.perf_counter() - begin
        print(f"{meta_gradients.__name__}: loss {losses.mean():.3f} in the last of {iterations}, {seconds:.1f} s")

    def one_by_one(net, batch) -> torch.Tensor:
        maml, losses = metakern.MAML(net, lr=0.01), []
        for x, y, query_x, query_y in zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True):
            learner = maml.clone()
            learner.adapt(F.mse_loss(learner(x), y))
            losses.append(F.mse_loss(learner(query_x), query_y))
        losses = torch.stack(losses)
        losses.mean().backward()
        return losses.detach()

    def all_at_once(net, batch) -> torch.Tensor:
        support, query = (batch.support_x, batch.support_y), (batch.query_x, batch.query_y)
        return metakern.meta_backward(net, support, query, loss=F.mse_loss, steps=1, lr=0.01)

    train(one_by_one)
    train(all_at_once)  # the same losses up to rounding


if __name__ == "__main__":
    main()
