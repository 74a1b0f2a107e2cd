"""Small models for the tests; tests import it by path, since test files of different packages share names."""

import torch
from localrecon import LocalNet, plan_split
from torch import nn


def mlp(width=12, depth=4, inputs=6, classes=3, activation=nn.Tanh, norm=False):
    torch.manual_seed(0)
    blocks = []
    for i in range(depth):
        layers = [nn.Linear(inputs if i == 0 else width, width), *([nn.LayerNorm(width)] if norm else []), activation()]
        blocks.append(nn.Sequential(*layers))
    return nn.Sequential(*blocks, nn.Linear(width, classes))


def dropout_mlp():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6 if i == 0 else 12, 12), nn.GELU(), nn.Dropout(0.3)) for i in range(4)]
    return nn.Sequential(*blocks, nn.Linear(12, 3))


def convs(depth=4, width=8, channels=3, classes=5):
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(channels if i == 0 else width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        for i in range(depth)
    ]
    return nn.Sequential(*blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)))


def split(model, sample, k, heads="auto", **options):
    torch.manual_seed(1)
    plan = plan_split(model, sample, k=k, measure=False, balance="blocks", **options)
    return LocalNet(model, plan, heads).train()


def vectors(count=16, inputs=6, classes=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return (
        torch.randn(count, inputs, generator=generator, dtype=dtype),
        torch.randint(classes, (count,), generator=generator),
    )


def images(count=8, size=8, channels=3, classes=5):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, channels, size, size, generator=generator), torch.randint(
        classes, (count,), generator=generator
    )


def sgds(net, lr=0.1):
    return [torch.optim.SGD(net.parameters_of(k), lr=lr, momentum=0.9) for k in range(net.k)]


def weights(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)
