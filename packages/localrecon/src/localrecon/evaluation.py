"""The accuracy of every head, and early exits."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from localrecon.chain import Inputs
from localrecon.losses import IGNORED, terms_of
from localrecon.net import LocalNet
from localrecon.optimizers import Net
from tenfold import UserError
from tenfold.modules import evaluating


def moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a dict of tensors, on that device."""
    return {key: item.to(device) for key, item in value.items()} if isinstance(value, Mapping) else value.to(device)


def evaluate(net: Net, loader: Iterable[tuple[Inputs, Tensor]], device: torch.device | str = "cpu") -> dict[str, float]:
    """Accuracy and loss of a net.

    Args:
        net: the net, on the device.
        loader: batches of inputs and labels.
        device: where to compute.

    Returns:
        ``accuracy`` of the last head in percent, its ``loss``, and ``accuracy 1`` .. of every head. Of a language model,
        ``loss`` is in nats per token, and there is ``bits`` in bits per token.
    """
    device = torch.device(device)
    task = net.plan.task if isinstance(net, LocalNet) else "classify"
    stages = net.segments if isinstance(net, LocalNet) else ()  # they are not registered in the net
    total, loss = 0, 0.0
    right = [0.0] * net.k
    with evaluating(net, *stages):
        for batch, answers in loader:
            inputs, labels = moved(batch, device), answers.to(device)
            exits = net.forward_exits(inputs)
            flat = [logits.flatten(0, -2).float() for logits in exits]
            truth = labels.flatten()
            loss += float(nn.functional.cross_entropy(flat[-1], truth, ignore_index=IGNORED, reduction="sum"))
            for k, logits in enumerate(flat):
                right[k] += float((logits.argmax(dim=1) == truth).sum())
            total += terms_of(labels, task)
    found = {"accuracy": 100 * right[-1] / total, "loss": loss / total}
    if task == "lm":
        found["bits"] = loss / total / math.log(2)
    return found | {f"accuracy {k}": 100 * r / total for k, r in enumerate(right, 1)}


class EarlyExit(nn.Module):
    """Classify with the first head that is sure enough.

    Args:
        net: a trained net.
        threshold: probability from which on an exit is taken. In (0, 1].

    Shapes: inputs (B, ...) -> logits (B, C) and the number of the exit (from 0 on) that each sample took (B,). Samples that
    have left are not computed further.
    """

    def __init__(self, net: LocalNet, threshold: float) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise UserError(f"threshold must be in (0, 1], got {threshold}")
        if net.plan.task != "classify" or net.chain.adapter == "transformers":
            raise UserError("early exits are for classifiers of plain tensors")
        self.net = net
        self.threshold = threshold

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the number of the exit that each sample took."""
        context = self.net.chain.context(x)
        left = torch.arange(x.shape[0], device=x.device)
        exits = torch.zeros_like(left)
        logits = None
        for stage in self.net.segments:
            x = stage.run_blocks(x, context)
            found = stage.logits(x, context)
            if logits is None:
                logits = found.clone()
            logits[left], exits[left] = found, stage.index
            stay = found.softmax(dim=1).amax(dim=1) < self.threshold
            x, left = x[stay], left[stay]
            if not len(left):
                break
        assert logits is not None
        return logits, exits


@torch.no_grad()
def early_exit(leave: EarlyExit, loader: Iterable[tuple[Tensor, Tensor]], device: str) -> dict[str, float]:
    """Accuracy with early exits, and the mean share of the modules' computation that was done."""
    plan = leave.net.plan
    flops = [sum(plan.flops[a:b]) for a, b in plan.ranges]
    done = torch.tensor(flops, dtype=torch.float64).cumsum(0) / max(1, sum(flops))
    right, total, spent = 0.0, 0, 0.0
    for inputs, labels in loader:
        logits, exits = leave(inputs.to(device))
        right += float((logits.argmax(dim=1).cpu() == labels).sum())
        spent += float(done[exits.cpu()].sum())
        total += len(labels)
    return {"accuracy with early exits": 100 * right / total, "share of the computation": spent / total}
