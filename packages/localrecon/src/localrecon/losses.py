"""The loss that a head asks for, and how many answers it gets right."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from localrecon.config import HeadSpec
from localrecon.inputs import Labels, samples_in
from tenfold import UserError

IGNORED = -100
"""Label of a sample or token that does not count."""
Loss = Callable[[Tensor, Labels], Tensor]
"""A user's loss: (what a head gives, labels) -> mean over the batch."""


def full_precision(logits: Tensor) -> Tensor:
    """Half precision becomes single; double stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def terms_of(labels: Labels, task: str) -> int:
    """Number of terms in the mean of the loss: samples or tokens that count; of a user's loss, samples."""
    if task == "custom" or labels.is_floating_point():
        return samples_in(labels)
    return int((labels != IGNORED).sum())


def loss_and_correct(
    head: Any,
    x: Tensor,
    labels: Labels,
    spec: HeadSpec,
    task: str,
    *,
    local: bool,
    loss: Loss | None = None,
    by_token: bool = True,
    name: str = "the module",
) -> tuple[Tensor, Tensor]:
    """Mean loss of a head, and how many samples (tokens) it gets right (NaN for a user's loss).

        L = (1 / N) sum_i ce(head(x)_i, y_i);  with PredSim ((1 - b) L + b mean_ij (S(x)_ij - S(y)_ij)^2)

    S is the matrix of cosine similarities between the samples of a batch, of centered features (of feature maps: their
    standard deviation over positions, as PredSim has it, without its extra convolution) and of centered labels. Labels that
    are probabilities are taken as they are: they are not smoothed again.

    Shapes: x (B, ...); labels (B,) int64, (B, C) probabilities, or (B, T) int64 for a language model -> two scalars.

    Raises:
        UserError: the head's output is not of the shape that goes with the labels.
    """
    if task == "custom":
        assert loss is not None
        value = loss(head(x), labels)
        if not isinstance(value, Tensor) or value.ndim:
            given = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"the loss of {name} is {given}: expected one number, the mean over the batch")
        return value, torch.full((), float("nan"))
    if task == "lm":
        return _lm_loss(head, x, labels, spec.chunk if by_token else labels.numel(), name)
    logits = full_precision(head(x))
    if logits.ndim != 2 or logits.shape[0] != labels.shape[0] or (labels.ndim == 2 and logits.shape != labels.shape):
        raise UserError(
            f"the head of {name} gives {tuple(logits.shape)} for labels of {tuple(labels.shape)}: expected (B, classes)"
        )
    if not bool((labels != IGNORED).any()):
        return logits.sum() * 0, logits.new_zeros((), dtype=torch.int64)
    smoothing = spec.label_smoothing if local and labels.ndim == 1 else 0.0
    value = F.cross_entropy(logits, labels, label_smoothing=smoothing, ignore_index=IGNORED)
    if local and spec.predsim:
        counted = labels != IGNORED if labels.ndim == 1 else torch.ones_like(labels[:, 0], dtype=torch.bool)
        answers = _similarity(_one_hot(labels[counted], logits))
        value = (1 - spec.predsim) * value + spec.predsim * F.mse_loss(_similarity(x[counted]), answers)
    truth = labels if labels.ndim == 1 else labels.argmax(dim=1)
    return value, (logits.argmax(dim=1) == truth).sum()


def _one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    return (F.one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels).to(logits.dtype)


def _similarity(x: Tensor) -> Tensor:
    x = x.flatten(2).std(dim=2) if x.ndim == 4 else x.mean(dim=1) if x.ndim == 3 else x
    x = full_precision(x)
    x = F.normalize(x - x.mean(dim=1, keepdim=True), dim=1)
    return x @ x.T


def _lm_loss(head: Any, x_BTD: Tensor, y_BT: Tensor, chunk: int, name: str) -> tuple[Tensor, Tensor]:
    """In chunks of tokens whose logits are computed again for the gradient, so that (B, T, V) never exists at once."""

    def part(x_BtD: Tensor, y_Bt: Tensor) -> tuple[Tensor, Tensor]:
        logits = full_precision(head(x_BtD))
        if logits.shape[:-1] != y_Bt.shape:
            raise UserError(
                f"the head of {name} gives {tuple(logits.shape)} for labels of {tuple(y_Bt.shape)}: expected one row of"
                " logits per label"
            )
        logits, y = logits.flatten(0, -2), y_Bt.flatten()
        right = ((logits.argmax(dim=1) == y) & (y != IGNORED)).sum()
        return F.cross_entropy(logits, y, ignore_index=IGNORED, reduction="sum"), right

    terms = (y_BT != IGNORED).sum().clamp_min(1)
    if y_BT.numel() <= chunk or x_BTD.ndim < 3 or x_BTD.shape[1] != y_BT.shape[1]:
        loss, correct = part(x_BTD, y_BT)
        return loss / terms, correct
    step = max(1, chunk // y_BT.shape[0])
    losses, corrects = [], []
    for x, y in zip(torch.split(x_BTD, step, dim=1), torch.split(y_BT, step, dim=1), strict=True):
        loss, correct = checkpoint(part, x, y, use_reentrant=False, preserve_rng_state=False)
        losses.append(loss)
        corrects.append(correct)
    return torch.stack(losses).sum() / terms, torch.stack(corrects).sum()
