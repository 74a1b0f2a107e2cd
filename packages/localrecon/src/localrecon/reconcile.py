"""The reconciliation of two gradients: distances, and four ways to the gradient of L + lambda R.

Module k asks its input x to change by g_in = dL_k/dx; the module before used the target T on the same tensor.
R = dist(g_in, T). Gradients here are per sample: of a mean loss over N terms, N times autograd's.

The functions ``exact``, ``shift``, ``fd`` and ``jvp`` are pure: a loss ``f(params, x)``, a dict of parameters, an input, a
target in the units of autograd's gradient of that mean loss. They return the gradient of L + lambda R for each parameter.
For a loop of your own; the trainers do the same in place.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Dist = Literal["sample", "mean", "relative", "cosine"]
Loss = Callable[[Mapping[str, Tensor], Tensor], Tensor]
Gradients = dict[str, Tensor]
_TINY = 1e-12


def distance(g: Tensor, t: Tensor, terms: int, dist: Dist) -> Tensor:
    """R of per-sample gradients.

        sample    (1/N) sum_i |g_i - t_i|^2
        mean      (1/N^2) sum_i |g_i - t_i|^2, which is |g_in - T|^2 of the gradients of the mean loss
        relative  sum_i |g_i - t_i|^2 / (sum_i |t_i|^2 + tiny)
        cosine    mean_i (1 - cos(g_i, t_i))

    Shapes: g, t (B, ...) -> scalar. ``terms`` is N.
    Source: form and direction after Yang et al., ICML 2024; the distance and its normalization were not found in public
    text, so sample is our reading.
    """
    if dist == "cosine":
        return (1 - F.cosine_similarity(g.flatten(1), t.flatten(1), dim=1)).mean()
    square = (g - t).square().sum()
    if dist == "relative":
        return square / (t.square().sum() + _TINY)
    return square / terms if dist == "sample" else square / terms**2


def direction(g: Tensor, t: Tensor, terms: int, dist: Dist) -> Tensor:
    """dR / dg_in, for the gradient g_in = g / N of the mean loss: N dR/dg.

    For sample it is 2 (g - t): shifting the input by lambda times it and taking the ordinary gradient there gives the
    gradient of L + lambda R, up to O(lambda^2).

    Shapes: g, t (B, ...) -> (B, ...).
    """
    if dist == "sample":
        return (g - t).mul_(2)
    if dist == "mean":
        return (g - t).mul_(2 / terms)
    if dist == "relative":
        return (g - t).mul_(2 * terms / (float(t.square().sum()) + _TINY))
    with torch.enable_grad():
        leaf = g.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(distance(leaf, t, terms, dist), leaf)
    return gradient * terms


def clip_shift(delta: Tensor, x: Tensor, limit: float) -> tuple[Tensor, float]:
    """Scale each sample's shift to at most ``limit`` times its norm; also the share of samples that this touches."""
    norms = delta.flatten(1).norm(dim=1)
    allowed = limit * x.flatten(1).norm(dim=1)
    over = norms > allowed
    if bool(over.any()):
        scale = torch.where(over, allowed / norms.clamp_min(_TINY), torch.ones_like(norms))
        delta = delta * scale.view(-1, *[1] * (delta.ndim - 1))
    return delta, float(over.float().mean())


def _leaves(params: Mapping[str, Tensor], x: Tensor) -> tuple[Gradients, Tensor]:
    return {name: p.detach().requires_grad_() for name, p in params.items()}, x.detach().requires_grad_()


def _pull(f: Loss, params: Mapping[str, Tensor], x: Tensor, target: Tensor, dist: Dist, terms: int | None) -> Tensor:
    """dR / dg_in at x: where the three estimators without a second graph look."""
    n = terms or x.shape[0]
    leaf = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(f({name: p.detach() for name, p in params.items()}, leaf), leaf)
    return direction(g * n, target.detach() * n, n, dist)


def _plain(f: Loss, params: Mapping[str, Tensor], x: Tensor) -> Gradients:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    return _named(leaves, torch.autograd.grad(f(leaves, x.detach()), list(leaves.values())))


def _named(names: Mapping[str, Tensor], values: tuple[Tensor, ...]) -> Gradients:
    return dict(zip(names, values, strict=True))


def exact(
    f: Loss,
    params: Mapping[str, Tensor],
    x: Tensor,
    target: Tensor,
    lam: float,
    dist: Dist = "sample",
    terms: int | None = None,
) -> Gradients:
    """Gradient of L + lambda R by a double backward.

    Args:
        f: (params, x) -> mean loss L.
        params: parameters that are trained.
        x: input (B, ...).
        target: T (B, ...), gradient of the mean loss of the module before at x.
        lam: weight lambda.
        dist: distance of the two gradients, see ``distance``.
        terms: number N of terms in the mean; default B.
    """
    n = terms or x.shape[0]
    leaves, leaf = _leaves(params, x)
    loss = f(leaves, leaf)
    (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
    total = loss + lam * distance(g * n, target.detach() * n, n, dist)
    return _named(leaves, torch.autograd.grad(total, list(leaves.values())))


def shift(
    f: Loss,
    params: Mapping[str, Tensor],
    x: Tensor,
    target: Tensor,
    lam: float,
    dist: Dist = "sample",
    terms: int | None = None,
    clip: float | None = None,
) -> Gradients:
    """Gradient of L + lambda R, up to O(lambda^2), with first derivatives alone (ours).

        grad_theta L(x + lambda dR/dg_in) = grad_theta (L + lambda R)(x) + O(lambda^2)

    Args:
        f: (params, x) -> mean loss L.
        params: parameters that are trained.
        x: input (B, ...).
        target: T (B, ...), gradient of the mean loss of the module before at x.
        lam: weight lambda.
        dist: distance of the two gradients, see ``distance``.
        terms: number N of terms in the mean; default B.
        clip: largest shift of a sample, as a share of its norm; None leaves it.
    """
    delta = _pull(f, params, x, target, dist, terms) * lam
    if clip is not None:
        delta, _ = clip_shift(delta, x, clip)
    return _plain(f, params, x.detach() + delta)


def fd(
    f: Loss,
    params: Mapping[str, Tensor],
    x: Tensor,
    target: Tensor,
    lam: float,
    dist: Dist = "sample",
    terms: int | None = None,
    eps: float = 1e-2,
    central: bool = False,
) -> Gradients:
    """Gradient of L + lambda R by finite differences along d = dR/dg_in.

        lambda grad R ~ (lambda / h) (grad L(x + h d) - grad L(x)),   h = eps rms(x) / rms(d)

    Args:
        f: (params, x) -> mean loss L.
        params: parameters that are trained.
        x: input (B, ...).
        target: T (B, ...), gradient of the mean loss of the module before at x.
        lam: weight lambda.
        dist: distance of the two gradients, see ``distance``.
        terms: number N of terms in the mean; default B.
        eps: relative size of the step: 1e-2 for smooth networks. For networks with kinks (ReLU) larger steps are better,
            5e-2, since their noise grows as eps^(-1/2).
        central: take +-h, which is exact where L is quadratic in x.
    """
    d = _pull(f, params, x, target, dist, terms)
    h = eps * float(x.detach().square().mean().sqrt()) / max(float(d.square().mean().sqrt()), _TINY)
    plain, ahead = _plain(f, params, x), _plain(f, params, x + h * d)
    behind, width = (_plain(f, params, x - h * d), 2 * h) if central else (plain, h)
    return {name: plain[name] + lam / width * (ahead[name] - behind[name]) for name in plain}


def jvp(
    f: Loss,
    params: Mapping[str, Tensor],
    x: Tensor,
    target: Tensor,
    lam: float,
    dist: Dist = "sample",
    terms: int | None = None,
) -> Gradients:
    """Gradient of L + lambda R by forward-over-reverse differentiation; slower than ``exact``, and independent of it.

    Args:
        f: (params, x) -> mean loss L.
        params: parameters that are trained.
        x: input (B, ...).
        target: T (B, ...), gradient of the mean loss of the module before at x.
        lam: weight lambda.
        dist: distance of the two gradients, see ``distance``.
        terms: number N of terms in the mean; default B.
    """
    d = _pull(f, params, x, target, dist, terms)
    fixed = {name: p.detach() for name, p in params.items()}

    def gradient(at: Tensor) -> Gradients:
        return torch.func.grad(lambda p: f(p, at))(fixed)

    pair: tuple[Gradients, Gradients] = torch.func.jvp(gradient, (x.detach(),), (d,))  # type: ignore[assignment]
    plain, along = pair
    return {name: plain[name] + lam * along[name] for name in plain}
