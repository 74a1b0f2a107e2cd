"""The losses of distillation, in plain torch: they know tensors, and nothing of detectors.

Shapes: P and T are rows (M, D) or maps (N, D, H, W); the feature dimension D is axis 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VARIANCE_FLOOR = 1e-6
"""Variance below which a target counts as constant; the normalized loss then divides by it instead of by zero."""


def mean_variance(target: Tensor) -> Tensor:
    """Population variance of each feature over all its samples, averaged over the features: mean_d Var(t_d)."""
    return target.float().transpose(0, 1).flatten(1).var(dim=1, correction=0).mean()


def mimic_loss(prediction: Tensor, target: Tensor, *, normalize: bool = False) -> Tensor:
    """How far ``prediction`` is from ``target``, in fp32 whatever comes in.

        plain:       MSE(p, t) = mean over all elements of (p - t)^2
        normalized:  MSE(p, t) / max(mean_d Var(t_d), 1e-6)

    The normalized form is the share of the target's variance that is left unexplained: 0 for a perfect copy, 1 for
    predicting each feature's mean, and the same for c p and c t as for p and t.

    Args:
        prediction: what is trained.
        target: what it should be; it gets no gradient.
        normalize: whether to take the second form.

    Shapes: both (M, D) or (N, D, H, W) -> scalar. Without rows the loss is 0 and its gradient is 0, not absent.
    Source: the plain form is that of the authors' code; the normalized one is ours.

    Example:
        >>> target = torch.tensor([[0.0], [2.0]])
        >>> mean = torch.ones(2, 1)  # it explains nothing
        >>> mimic_loss(mean, target), mimic_loss(mean, target, normalize=True)
        (tensor(1.), tensor(1.))
    """
    target = target.detach()
    if prediction.numel() == 0:
        return prediction.sum()
    error = F.mse_loss(prediction.float(), target.float())
    return error / mean_variance(target).clamp_min(VARIANCE_FLOOR) if normalize else error


def pkd_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - Pearson correlation of each channel, averaged: half the MSE of maps with mean 0 and variance 1 in each channel.

    Args:
        prediction: the student's map.
        target: the teacher's map; resized bilinearly where the sizes differ.

    Shapes: (N, D, H, W) both -> scalar. Statistics are over N, H and W.
    Source: PKD, NeurIPS 2022 (arXiv 2207.02039), Eq. 4 to 6.

    Example:
        >>> maps = torch.randn(2, 4, 8, 8)
        >>> bool(pkd_loss(3 * maps + 1, maps) < 1e-5), bool((pkd_loss(-maps, maps) - 2).abs() < 1e-5)
        (True, True)
    """
    target = target.detach().float()
    if target.shape[2:] != prediction.shape[2:]:
        target = F.interpolate(target, prediction.shape[2:], mode="bilinear")
    standard = []
    for feature_map in (prediction.float(), target):
        by_channel = feature_map.transpose(0, 1).flatten(1)
        spread = by_channel.std(dim=1, correction=0, keepdim=True)
        standard.append((by_channel - by_channel.mean(dim=1, keepdim=True)) / (spread + VARIANCE_FLOOR))
    return F.mse_loss(standard[0], standard[1]) / 2


def ramp(step: int, *, warmup: int, start: int = 0, stop: int | None = None) -> float:
    """Schedule w(i) = clamp((i - start) / warmup, 0, 1), and 0 from ``stop`` on.

    Source: the authors' code has warmup 2000 and w(0) = 0; TF-HEAD stops at the first drop of the learning rate.

    Example:
        >>> [ramp(step, warmup=4) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    if stop is not None and step >= stop:
        return 0.0
    if warmup <= 0:
        return float(step >= start)
    return min(1.0, max(0.0, (step - start) / warmup))


class PerAnchorLinear(nn.Module):
    """One linear map per anchor of a cell: y_m = W_{a(m)} x_m + b_{a(m)}.

    Args:
        num_anchors: anchors A of a cell.
        in_features: features C that each map takes.
        out_features: features D that each map gives.

    Shapes: ``features`` (M, C), ``anchor`` (M,) int64 in [0, A) -> (M, D).
    Source: the authors' development code for RetinaNet students, where A = 9.

    Example:
        >>> adapter = PerAnchorLinear(num_anchors=9, in_features=4, out_features=2)
        >>> adapter(torch.randn(5, 4), torch.tensor([0, 8, 3, 3, 1])).shape
        torch.Size([5, 2])
    """

    def __init__(self, num_anchors: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(in_features, out_features) for _ in range(num_anchors))

    def forward(self, features: Tensor, anchor: Tensor) -> Tensor:
        """Map each row by its anchor's map."""
        first: nn.Linear = self.maps[0]  # type: ignore[assignment]
        out = features.new_zeros(len(features), first.out_features)
        for index, linear in enumerate(self.maps):
            rows = (anchor == index).nonzero().squeeze(1)
            out = out.index_copy(0, rows, linear(features[rows]).to(out))
        return out


def gap_r2(features: Tensor, targets: Tensor, *, ridge: float = 1e-2, held_out: float = 0.5) -> float:
    """The semantic gap as a number: R^2 with which a linear map predicts ``targets`` from ``features``, held out.

        W = argmin ||X W - T||^2 + ridge * trace(X'X)/C * ||W||^2 on the first rows
        R^2 = 1 - ||T - X W||^2 / ||T - mean T||^2       on the last rows

    1 says that a linear adapter can copy the teacher; 0, that it does no better than the mean; below 0, that what it
    fits does not carry over.

    Args:
        features: activations of the student or assistant.
        targets: activations of the teacher, row by row for the same regions.
        ridge: share of the mean eigenvalue that is added to the diagonal.
        held_out: share of the rows that R^2 is measured on.

    Shapes: (M, C) and (M, D); fp64 inside. Fewer than four rows give nan.
    Source: ours.

    Example:
        >>> x = torch.randn(200, 3)
        >>> gap_r2(x, x @ torch.randn(3, 5), ridge=0.0) > 0.999
        True
    """
    rows = len(features)
    cut = rows - int(rows * held_out)
    if cut < 2 or rows - cut < 2:
        return float("nan")
    x, t = features.detach().double(), targets.detach().double()
    x_mean, t_mean = x[:cut].mean(dim=0), t[:cut].mean(dim=0)
    x_fit, t_fit = x[:cut] - x_mean, t[:cut] - t_mean
    gram = x_fit.T @ x_fit
    damped = gram + ridge * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(
        len(gram), dtype=x.dtype, device=x.device
    )
    weight = torch.linalg.solve(damped, x_fit.T @ t_fit)
    residual = t[cut:] - t_mean - (x[cut:] - x_mean) @ weight
    total = ((t[cut:] - t[cut:].mean(dim=0)) ** 2).sum()
    return float(1 - (residual**2).sum() / total.clamp_min(1e-12))
