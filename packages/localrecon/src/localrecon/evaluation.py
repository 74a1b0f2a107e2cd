"""The accuracy of every head, and early exits."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from localrecon.inputs import Inputs, Labels, moved, samples_in, split_batch, tensors_of
from localrecon.losses import IGNORED, terms_of
from localrecon.net import LocalNet
from localrecon.optimizers import Net
from tenfold import UserError
from tenfold.modules import evaluating


def evaluate(net: Net, loader: Iterable[Any], device: torch.device | str = "cpu") -> dict[str, float]:
    """Accuracy and loss of a net.

    Args:
        net: the net, on the device.
        loader: batches of inputs and labels, as ``localrecon.inputs.split_batch`` takes them.
        device: where to compute.

    Returns:
        ``accuracy`` of the last head in percent, its ``loss``, and ``accuracy 1`` .. of every head. Of a language model,
        ``loss`` is in nats per token, and there is ``bits`` in bits per token. With a loss of the user's: ``loss``, and
        ``loss 1`` .. of every head.

    Raises:
        UserError: the loader gives nothing.
    """
    device = torch.device(device)
    task = net.plan.task if isinstance(net, LocalNet) else "classify"
    stages = net.segments if isinstance(net, LocalNet) else ()  # they are not registered in the net
    if isinstance(net, LocalNet) and net.loss is not None:
        return _own_losses(net, loader, device)
    total, loss = 0, 0.0
    right = [0.0] * net.k
    with evaluating(net, *stages):
        for batch in loader:
            inputs, labels = moved(split_batch(batch), device)
            exits = net.forward_exits(inputs)
            flat = [logits.flatten(0, -2).float() for logits in exits]
            soft = labels.is_floating_point()
            truth = labels if soft else labels.flatten()
            loss += float(nn.functional.cross_entropy(flat[-1], truth, ignore_index=IGNORED, reduction="sum"))
            answers = labels.argmax(dim=1) if soft else truth
            for k, logits in enumerate(flat):
                right[k] += float((logits.argmax(dim=1) == answers).sum())
            total += terms_of(labels, task)
    if not total:
        raise UserError("there is no sample to evaluate on")
    found = {"accuracy": 100 * right[-1] / total, "loss": loss / total}
    if task == "lm":
        found["bits"] = loss / total / math.log(2)
    return found | {f"accuracy {k}": 100 * r / total for k, r in enumerate(right, 1)}


@torch.no_grad()
def evaluate_batch(net: Net, inputs: Inputs, labels: Labels) -> dict[str, float]:
    """Loss (``loss``) and accuracy in [0, 1] (``acc``; not with a loss of the user's) of the last head on one batch.

    ``terms`` is the number of samples or tokens that count, by which means over batches are to be weighted.
    """
    if isinstance(net, LocalNet) and net.loss is not None:
        return {"loss": float(net.loss(net.forward_exits(inputs)[-1], labels)), "terms": samples_in(labels)}
    logits = net.forward_exits(inputs)[-1].flatten(0, -2).float()
    if labels.is_floating_point():
        truth, counted = labels.argmax(dim=1), torch.ones_like(labels[:, 0], dtype=torch.bool)
        loss = nn.functional.cross_entropy(logits, labels)
    else:
        truth = labels.flatten().long()
        counted = truth != IGNORED
        loss = nn.functional.cross_entropy(
            logits, truth, ignore_index=IGNORED, reduction="sum"
        ) / counted.sum().clamp_min(1)
    right = (logits.argmax(dim=1) == truth)[counted].sum() / counted.sum().clamp_min(1)
    return {"loss": float(loss), "acc": float(right), "terms": int(counted.sum())}


def _own_losses(net: LocalNet, loader: Iterable[Any], device: torch.device) -> dict[str, float]:
    """The user's loss of every head, each batch weighted by its samples."""
    total, sums = 0, [0.0] * net.k
    assert net.loss is not None
    with evaluating(net, *net.segments):
        for batch in loader:
            inputs, labels = moved(split_batch(batch), device)
            count = samples_in(labels)
            for k, output in enumerate(net.forward_exits(inputs)):
                sums[k] += count * float(net.loss(output, labels))
            total += count
    if not total:
        raise UserError("there is no sample to evaluate on")
    return {"loss": sums[-1] / total} | {f"loss {k}": value / total for k, value in enumerate(sums, 1)}


class EarlyExit(nn.Module):
    """Classify with the first head that is sure enough.

    Args:
        net: a trained net.
        threshold: probability from which on an exit is taken. In (0, 1].

    Shapes: inputs (B, ...) -> logits (B, C) and the number of the exit (from 0 on) that each sample took (B,). Samples that
    have left are not computed further.

    Example:
        >>> from localrecon import LocalNet, plan_split
        >>> x = torch.randn(4, 8)
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> net = LocalNet(model, plan_split(model, x, k=2))
        >>> logits, exits = EarlyExit(net, threshold=1e-3)(x)  # so low that all leave at the first head
        >>> logits.shape, exits.tolist()
        (torch.Size([4, 3]), [0, 0, 0, 0])
    """

    def __init__(self, net: LocalNet, threshold: float) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise UserError(f"threshold must be in (0, 1], got {threshold}")
        if net.plan.task != "classify":
            raise UserError(f"early exits are for classifiers, not for the task {net.plan.task}")
        self.net = net
        self.threshold = threshold

    @torch.no_grad()
    def forward(self, x: Any) -> tuple[Tensor, Tensor]:
        """Logits, and the number of the exit that each sample took."""
        context = self.net.chain.context(x)
        left = torch.arange(samples_in(x), device=tensors_of(x)[0].device)
        exits = torch.zeros_like(left)
        logits = None
        for stage in self.net.segments:
            x = stage.run_blocks(x, context)
            found = stage.logits(x, context)
            if logits is None:
                logits = found.clone()
            logits[left], exits[left] = found, stage.index
            stay = found.softmax(dim=1).amax(dim=1) < self.threshold
            if not bool(stay.any()):
                break
            if not bool(stay.all()):
                x, left, context = x[stay], left[stay], self.net.chain.select(context, stay)
        assert logits is not None
        return logits, exits


@torch.no_grad()
def early_exit(leave: EarlyExit, loader: Iterable[Any], device: str) -> dict[str, float]:
    """Accuracy with early exits, and the mean share of the modules' computation that was done."""
    plan = leave.net.plan
    flops = [sum(plan.flops[a:b]) for a, b in plan.ranges]
    done = torch.tensor(flops, dtype=torch.float64).cumsum(0) / max(1, sum(flops))
    right, total, spent = 0.0, 0, 0.0
    for batch in loader:
        inputs, labels = split_batch(batch)
        logits, exits = leave(moved(inputs, device))
        right += float((logits.argmax(dim=1).cpu() == labels).sum())
        spent += float(done[exits.cpu()].sum())
        total += len(labels)
    return {"accuracy with early exits": 100 * right / total, "share of the computation": spent / total}
