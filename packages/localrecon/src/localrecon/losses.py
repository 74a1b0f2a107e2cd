"""The loss that a head asks for, and how many answers it gets right."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from localrecon.config import HeadSpec

IGNORED = -100
"""Label of a token that does not count."""


def full_precision(logits: Tensor) -> Tensor:
    """Half precision becomes single; double stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


def terms_of(labels: Tensor, task: str) -> int:
    """Number of terms in the mean of the loss: samples, or tokens that count."""
    return int((labels != IGNORED).sum()) if task == "lm" else labels.shape[0]


def loss_and_correct(
    head: Any, x: Tensor, labels: Tensor, spec: HeadSpec, task: str, *, local: bool
) -> tuple[Tensor, Tensor]:
    """Mean loss of a head, and how many samples (tokens) it gets right.

        L = (1 / N) sum_i ce(head(x)_i, y_i);  with PredSim ((1 - b) L + b mean_ij (S(x)_ij - S(y)_ij)^2)

    S is the matrix of cosine similarities between the samples of a batch, of centered features (of feature maps: their
    standard deviation over positions, as PredSim has it, without its extra convolution) and of centered labels.

    Shapes: x (B, ...); labels (B,) int64, (B, C) probabilities, or (B, T) int64 for a language model -> two scalars.
    """
    if task == "lm":
        return _lm_loss(head, x, labels, spec.chunk)
    logits = full_precision(head(x))
    loss = F.cross_entropy(logits, labels, label_smoothing=spec.label_smoothing if local else 0.0)
    if local and spec.predsim:
        loss = (1 - spec.predsim) * loss + spec.predsim * F.mse_loss(
            _similarity(x), _similarity(_one_hot(labels, logits))
        )
    truth = labels if labels.ndim == 1 else labels.argmax(dim=1)
    return loss, (logits.argmax(dim=1) == truth).sum()


def _one_hot(labels: Tensor, logits: Tensor) -> Tensor:
    return (F.one_hot(labels, logits.shape[1]) if labels.ndim == 1 else labels).to(logits.dtype)


def _similarity(x: Tensor) -> Tensor:
    x = x.flatten(2).std(dim=2) if x.ndim == 4 else x.mean(dim=1) if x.ndim == 3 else x
    x = full_precision(x)
    x = F.normalize(x - x.mean(dim=1, keepdim=True), dim=1)
    return x @ x.T


def _lm_loss(head: Any, x: Tensor, labels: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """In chunks of tokens whose logits are computed again for the gradient, so that (B T, V) never exists at once."""
    x_ND, y_N = x.flatten(0, 1), labels.flatten()

    def part(x_MD: Tensor, y_M: Tensor) -> tuple[Tensor, Tensor]:
        logits = full_precision(head(x_MD))
        right = ((logits.argmax(dim=1) == y_M) & (y_M != IGNORED)).sum()
        return F.cross_entropy(logits, y_M, ignore_index=IGNORED, reduction="sum"), right

    terms = (y_N != IGNORED).sum().clamp_min(1)
    if len(y_N) <= chunk:
        loss, correct = part(x_ND, y_N)
        return loss / terms, correct
    losses, corrects = [], []
    for x_MD, y_M in zip(torch.split(x_ND, chunk), torch.split(y_N, chunk), strict=True):
        loss, correct = checkpoint(part, x_MD, y_M, use_reentrant=False, preserve_rng_state=False)
        losses.append(loss)
        corrects.append(correct)
    return torch.stack(losses).sum() / terms, torch.stack(corrects).sum()
