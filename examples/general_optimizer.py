"""The optimizer that ships as "general" on your network, in Adam's place.

python examples/general_optimizer.py --iterations 300
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from metakern.optim import LearnedOptimizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--iterations", type=int, default=300)
    iterations = parser.parse_args().iterations

    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32).div(16).unsqueeze(1), torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1500], order[1500:]

    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)]
    net = nn.Sequential(*layers)
    optimizer = LearnedOptimizer(net.parameters(), "general")  # no learning rate to tune
    for iteration in range(iterations):
        batch = train[torch.randint(len(train), (128,))]
        loss = F.cross_entropy(net(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration % 50 == 0:
            print(f"iteration {iteration}: loss {loss.item():.3f}")

    accuracy = (net(x[test]).argmax(-1) == y[test]).float().mean()
    print(f"accuracy on images that training has not seen: {accuracy:.3f}")


if __name__ == "__main__":
    main()
