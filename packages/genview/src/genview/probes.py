"""What frozen features are worth to a linear classifier: many learning rates at once, on features computed once.

Shapes: N pictures, D entries of a feature, C classes, R learning rates.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.images import of_each
from tenfold.randomness import generator

RATES = (1e-3, 30.0)
"""Least and largest learning rate of a sweep."""
HELD_OUT = 0.2
"""Share of the training features that choose the rate."""


@dataclass(frozen=True)
class ProbeResult:
    """What a probe found.

    Attributes:
        top1: right answers on the test features, in percent.
        rate: learning rate that was chosen on held-out training features.
        rates: all learning rates.
        held_out: accuracy of each on the held-out training features.
        weight: the classifier (C, D), for standardized features.
        bias: its bias (C,).
    """

    top1: float
    rate: float
    rates: tuple[float, ...]
    held_out: tuple[float, ...]
    weight: Tensor
    bias: Tensor


def rates_of(number: int) -> tuple[float, ...]:
    """Learning rates evenly spaced in the logarithm."""
    low, high = (math.log(x) for x in RATES)
    return tuple(math.exp(low + (high - low) * i / max(1, number - 1)) for i in range(number))


def standardized(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Features with the mean and deviation of the training features taken out, as a batch norm without affine would."""
    mean, std = train.float().mean(dim=0), train.float().std(dim=0).clamp_min(1e-6)
    return tuple((x.float() - mean) / std for x in (train, *others))


def train_heads(
    features: Tensor,
    labels: Tensor,
    classes: int,
    rates: tuple[float, ...],
    *,
    epochs: int = 90,
    batch_size: int = 256,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Train one linear classifier per learning rate, all in one product per step, by SGD with momentum and a cosine.

    The rates are for a batch of 256 and scale with it. Each is scaled by the mean square of a feature's length, so that one
    range fits backbones of any width.

    Args:
        features: standardized.
        labels: their classes.
        classes: number of classes.
        rates: learning rates.
        epochs: passes.
        batch_size: features per step.
        weight_decay: of the weights.
        seed: seed of the order.

    Shapes: (N, D), (N,) int64 -> weights (R, C, D), biases (R, C).
    """
    n, dim = features.shape
    batch_size = min(batch_size, n)
    steps = epochs * max(1, n // batch_size)
    w = features.new_zeros(len(rates), classes, dim)
    b = features.new_zeros(len(rates), classes)
    vw, vb = torch.zeros_like(w), torch.zeros_like(b)
    lr = features.new_tensor(rates) * batch_size / 256
    step = 0
    for epoch in range(epochs):
        order = torch.randperm(n, generator=generator(seed, epoch)).to(features.device)
        for index in order[: n // batch_size * batch_size].view(-1, batch_size):
            x, y = features[index], labels[index]
            logits = torch.matmul(x, w.transpose(1, 2)) + b[:, None]
            grad = logits.softmax(dim=2)
            grad.sub_(F.one_hot(y, classes).to(grad)).div_(batch_size)
            vw.mul_(0.9).add_(torch.matmul(grad.transpose(1, 2), x) + weight_decay * w)
            vb.mul_(0.9).add_(grad.sum(dim=1))
            rate = lr * (math.cos(math.pi * step / steps) + 1) / 2 / math.sqrt(dim)
            w.sub_(rate[:, None, None] * vw)
            b.sub_(rate[:, None] * vb)
            step += 1
    return w, b


def accuracy(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Right answers of each classifier in percent. Shapes: (N, D), (N,), (R, C, D), (R, C) -> (R,)."""
    answers = (torch.matmul(features, weight.transpose(1, 2)) + bias[:, None]).argmax(dim=2)
    return 100 * (answers == labels).double().mean(dim=1)


def linear_sweep(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    rates: int = 20,
    epochs: int = 90,
    batch_size: int = 256,
    seed: int = 0,
) -> ProbeResult:
    """The linear probe on features computed once; the learning rate is chosen on a fifth of the training features.

    Args:
        train: features to learn from.
        train_labels: their classes.
        test: features to be measured on.
        test_labels: their classes.
        rates: number of learning rates.
        epochs: passes.
        batch_size: features per step.
        seed: seed of the order.

    Shapes: (N, D), (N,), (T, D), (T,).
    """
    x, t = standardized(train, test)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    every = rates_of(rates)
    held = of_each(train_labels.cpu(), lambda count: min(max(1, round(HELD_OUT * count)), count - 1))
    rest = sorted(set(range(len(x))) - set(held))
    w, b = train_heads(x[rest], train_labels[rest], classes, every, epochs=epochs, batch_size=batch_size, seed=seed)
    found = accuracy(x[held], train_labels[held], w, b)
    best = every[int(found.argmax())]
    w, b = train_heads(x, train_labels, classes, (best,), epochs=epochs, batch_size=batch_size, seed=seed)
    top1 = float(accuracy(t, test_labels, w, b)[0])
    return ProbeResult(top1, best, every, tuple(found.tolist()), w[0], b[0])


def few_labels(labels: Tensor, share: float) -> list[int]:
    """Indices of a share of each class, at least one, the same for equal labels."""
    return of_each(labels, lambda count: max(1, round(count * share)))
