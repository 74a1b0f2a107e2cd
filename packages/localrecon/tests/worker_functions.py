"""What the tests of several processes send to them: it must be importable there."""

import torch
from torch import nn


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


class Dies(torch.optim.SGD):
    def step(self, closure=None):
        import os

        os._exit(7)


def dying(parameters):
    return Dies(parameters, lr=0.1)


def net_with_dropout():
    from localrecon import LocalNet, plan_split

    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Linear(6 if i == 0 else 12, 12), nn.BatchNorm1d(12), nn.GELU(), nn.Dropout(0.3))
        for i in range(4)
    ]
    model = nn.Sequential(*blocks, nn.Linear(12, 3))
    plan = plan_split(model, torch.randn(8, 6), k=3, measure=False)
    return LocalNet(model, plan).train()
