"""Losses of self-supervised methods that take a weight for each pair: drop-in for those that people use.

Each is called as ``loss(out0, out1, weight=None)``; without weights, and with weights of 1, it is the plain loss of lightly
or of the method's own code, bit for bit the same in both cases. A weight is one number per pair (see ``pair_weights``), and
both directions of a symmetric loss share it.

Shapes: n pairs on this process, W processes, D dimensions.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from genview.contrast import CHUNK, info_nce
from genview.weights import check_weight, weighted_mean
from tenfold import distributed

UNWEIGHTED = {
    "barlow": "Barlow Twins compares dimensions of the whole batch, not samples: it has no loss of a pair to weigh",
    "vicreg": "VICReg's variance and covariance are of the whole batch: it has no loss of a pair to weigh",
}
"""Methods that cannot be weighted, and why."""


def check_method(name: str) -> None:
    """Refuse a method that has no loss of a pair.

    Raises:
        NotImplementedError: Barlow Twins or VICReg, with the reason.
    """
    for start, reason in UNWEIGHTED.items():
        if name.lower().replace("_", "").replace("-", "").startswith(start):
            raise NotImplementedError(reason)


def _check_pairs(out0: Tensor, out1: Tensor) -> None:
    if out0.shape != out1.shape or out0.ndim != 2:
        raise ValueError(
            f"views of {tuple(out0.shape)} and {tuple(out1.shape)} do not form pairs: expected (n, D) twice"
        )


def gathered(rows: Tensor) -> Tensor:
    """Rows of all processes, in order of rank, with gradient; the rows themselves without a process group.

    Raises:
        ValueError: the processes hold different numbers of rows, so that nobody's place among them would be right.
    """
    if distributed.world_size() > 1:
        counts = distributed.all_gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"the processes hold {', '.join(map(str, counts))} pairs: a loss over all of them needs equal batches"
                " (drop_last=True, or a sampler that pads)"
            )
    return distributed.all_gather(rows)


def _wide(rows: Tensor) -> tuple[Tensor, float]:
    """Rows and the least length that they are divided by: in half precision float32, and gradients that float16 can hold."""
    return (rows.float(), 1e-4) if rows.dtype in {torch.float16, torch.bfloat16} else (rows, 1e-12)


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1."""
    rows, least = _wide(rows)
    return F.normalize(rows, dim=1, eps=least)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be more than 0, got {temperature}")


class QDNTXentLoss(nn.Module):
    """SimCLR's loss, each pair weighted.

        L = 1/(2n) sum_k w_{pair(k)} l_k,    l_k = -log( exp(<z_k, z_pos(k)>/T) / sum_{m != k} exp(<z_k, z_m>/T) )

    Memory is that of ``chunk`` rows of the matrix of all pairs.

    Args:
        temperature: T. lightly's default is 0.5, solo-learn's 0.1; SimCLR's best 0.1 to 0.5.
        gather: compare with the views of all processes.
        chunk: anchors at once.

    Shapes: (n, D), (n, D), weight (n,) -> scalar.

    Raises:
        ValueError: a temperature of 0 or less; views or weights that do not fit.

    Source: SimCLR, arXiv 2002.05709, Eq. 1; weights: GenView, ECCV 2024.

    Example:
        >>> out0, out1 = torch.randn(4, 8), torch.randn(4, 8)
        >>> torch.equal(QDNTXentLoss()(out0, out1), QDNTXentLoss()(out0, out1, torch.ones(4)))
        True
    """

    def __init__(self, temperature: float = 0.2, *, gather: bool = True, chunk: int = CHUNK) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.temperature, self.gather, self.chunk = temperature, gather, chunk

    def per_pair(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Loss of each pair, mean of its two anchors. Shapes: -> (n,)."""
        _check_pairs(out0, out1)
        z0, z1 = unit(out0), unit(out1)
        together = self.gather and distributed.world_size() > 1
        all0, all1 = (gathered(z0), distributed.all_gather(z1)) if together else (z0, z1)
        n, total = len(z0), len(all0)
        first = torch.arange(n, device=z0.device) + (n * distributed.rank() if together else 0)
        own = torch.cat([first, first + total])
        positive = torch.cat([first + total, first])
        z_AD, c_MD = torch.cat([z0, z1]), torch.cat([all0, all1])
        losses = info_nce(z_AD, c_MD, positive, exclude=own, temperature=self.temperature, chunk=self.chunk)
        return (losses[:n] + losses[n:]) / 2

    def forward(self, out0: Tensor, out1: Tensor, weight: Tensor | None = None) -> Tensor:
        """Weighted mean over pairs."""
        weight = check_weight(weight, len(out0), device=out0.device)
        return weighted_mean(self.per_pair(out0, out1), weight)


class QDMoCoLoss(nn.Module):
    """MoCo v2's loss with its queue of keys, each pair weighted.

        l_i = CE([<q_i, k_i>, <q_i, queue>] / T, class 0)

    The queue is a buffer, so that it is in every checkpoint; it starts as random unit vectors and is written around its end,
    whatever the size of a batch. On several processes the keys of all go into it.

    Args:
        dim: size D.
        size: keys in the queue (65,536 in MoCo v2).
        temperature: T (0.2).
        seed: seed of the first content.

    Shapes: queries (n, D), keys (n, D), weight (n,) -> scalar.

    Raises:
        ValueError: a temperature of 0 or less, an empty queue; queries, keys or weights that do not fit.

    Source: MoCo v2, arXiv 2003.04297; weights: GenView, ECCV 2024.

    Example:
        >>> loss = QDMoCoLoss(dim=8, size=16)
        >>> queries, keys = torch.nn.functional.normalize(torch.randn(2, 4, 8), dim=-1)
        >>> loss(queries, keys, torch.tensor([1.5, 0.5, 1.0, 1.0])).shape
        torch.Size([])
    """

    queue: Tensor
    pointer: Tensor

    def __init__(self, dim: int, size: int = 65536, temperature: float = 0.2, *, seed: int = 0) -> None:
        super().__init__()
        _check_temperature(temperature)
        if size < 1:
            raise ValueError(f"a queue holds 1 key or more, got {size}")
        self.temperature = temperature
        start = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("queue", F.normalize(start, dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def per_pair(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Loss of each pair against the queue as it is. Shapes: -> (n,)."""
        _check_pairs(queries, keys)
        with torch.autocast(queries.device.type, enabled=False):
            q, k = unit(queries), unit(keys.detach())
            positive = (q * k).sum(dim=1, keepdim=True)
            negative = q @ self.queue.clone().to(q.dtype).T  # a copy: the queue changes before the backward pass
            logits = torch.cat([positive, negative], dim=1) / self.temperature
            return torch.logsumexp(logits, dim=1) - logits[:, 0]

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Put keys into the queue, the oldest ones out; of more keys than it holds, the last ones stay."""
        k = unit(keys.detach())
        if distributed.world_size() > 1:
            k = gathered(k)
        size = len(self.queue)
        where = (self.pointer + torch.arange(len(k), device=k.device)) % size
        self.queue[where[-size:]] = k[-size:].to(self.queue.dtype)
        self.pointer.copy_((self.pointer + len(k)) % size)

    def forward(self, queries: Tensor, keys: Tensor, weight: Tensor | None = None) -> Tensor:
        """Weighted mean over pairs; the keys then join the queue, in training mode."""
        weight = check_weight(weight, len(queries), device=queries.device)
        loss = weighted_mean(self.per_pair(queries, keys), weight)
        if self.training:
            self.enqueue(keys)
        return loss


class QDMoCoV3Loss(nn.Module):
    """One direction of MoCo v3's loss, each pair weighted; the method adds both, ``loss(q1, k2, w) + loss(q2, k1, w)``.

        l_i = 2 T CE(<q_i, k_j>_j / T, i)

    Keys are gathered over all processes, without gradient.

    Args:
        temperature: T; 1.0 for ResNet-50, 0.2 for ViT.

    Shapes: predictions (n, D), momentum keys (n, D), weight (n,) -> scalar.

    Raises:
        ValueError: a temperature of 0 or less; queries, keys or weights that do not fit.

    Source: MoCo v3, arXiv 2104.02057, Algorithm 1; weights: GenView, ECCV 2024.

    Example:
        >>> q1, k2 = torch.randn(4, 8), torch.randn(4, 8)
        >>> torch.equal(QDMoCoV3Loss()(q1, k2), QDMoCoV3Loss()(q1, k2, torch.ones(4)))
        True
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.temperature = temperature

    def per_pair(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Loss of each pair. Shapes: -> (n,)."""
        _check_pairs(queries, keys)
        q, k = unit(queries), unit(keys.detach())
        own = torch.arange(len(q), device=q.device) + len(q) * distributed.rank()
        losses = info_nce(q, gathered(k), own, temperature=self.temperature)
        return 2 * self.temperature * losses

    def forward(self, queries: Tensor, keys: Tensor, weight: Tensor | None = None) -> Tensor:
        """Weighted mean over pairs."""
        return weighted_mean(self.per_pair(queries, keys), check_weight(weight, len(queries), device=queries.device))


class QDNegativeCosine(nn.Module):
    """One direction of SimSiam's or BYOL's loss, each pair weighted.

        SimSiam: l_i = -cos(p_i, sg(z_i));    BYOL: l_i = 2 - 2 cos(p_i, sg(z_i))

    SimSiam takes half the sum of both directions, BYOL their sum.

    Args:
        byol: BYOL's scale and offset.

    Shapes: predictions (n, D), targets (n, D), weight (n,) -> scalar. No gradient goes into the targets. Where the first has no
    gradient and the second has one, they change places: lightly's scripts give the target first.

    Raises:
        ValueError: predictions, targets or weights that do not fit.

    Source: SimSiam, arXiv 2011.10566, Eq. 1; BYOL, arXiv 2006.07733, Eq. 2; weights: GenView, ECCV 2024.

    Example:
        >>> p = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> QDNegativeCosine()(p, p, torch.tensor([1.5, 0.5]))
        tensor(-1.)
    """

    def __init__(self, *, byol: bool = False) -> None:
        super().__init__()
        self.byol = byol

    def per_pair(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Loss of each pair. Shapes: -> (n,)."""
        _check_pairs(predictions, targets)
        if targets.requires_grad and not predictions.requires_grad:
            predictions, targets = targets, predictions
        (p, least), (t, _) = _wide(predictions), _wide(targets.detach())
        cosine = F.cosine_similarity(p, t, dim=1, eps=max(least, 1e-8))
        return 2 - 2 * cosine if self.byol else -cosine

    def forward(self, predictions: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """Weighted mean over pairs."""
        weight = check_weight(weight, len(predictions), device=predictions.device)
        return weighted_mean(self.per_pair(predictions, targets), weight)


@torch.no_grad()
def sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft assignments of samples to prototypes that use all prototypes alike, over all processes.

    Shapes: (n, P) cosines -> (n, P), rows of sum 1.
    Source: SwAV, arXiv 2006.09882, section 3.1 and appendix A.
    """
    logits = scores.double() / epsilon
    top = logits.amax()
    world = distributed.world_size()
    if world > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
    q_PN = (logits - top).exp().T
    prototypes, samples = q_PN.shape[0], q_PN.shape[1] * world

    def total(x: Tensor) -> Tensor:
        return distributed.all_reduce_sums({"x": x})["x"]

    q_PN = q_PN / total(q_PN.sum())
    for _ in range(iterations):
        q_PN = q_PN / total(q_PN.sum(dim=1, keepdim=True)) / prototypes
        q_PN = q_PN / q_PN.sum(dim=0, keepdim=True) / samples
    return (q_PN * samples).T.to(scores.dtype)


class QDSwAVLoss(nn.Module):
    """SwAV's swapped prediction, each sample weighted; the assignments themselves are not.

        L = mean over crops i of the two, and the other crops v, of -1/n sum_i w_i sum_p q_ip log softmax(s_v / T)_ip

    The authors list a SwAV trained with GenView but published no code for it: that the weight goes on the cross-entropy and
    not into Sinkhorn is our choice.

    Args:
        temperature: T (0.1).
        epsilon: smoothness of the assignments (0.05).
        iterations: of Sinkhorn (3).

    Shapes: lists of scores (n, P) of high- and low-resolution crops, weight (n,) -> scalar.

    Raises:
        ValueError: a temperature of 0 or less; fewer than two crops; weights that do not fit.

    Source: SwAV, arXiv 2006.09882, Eq. 1 and 2.

    Example:
        >>> scores = [torch.randn(4, 6), torch.randn(4, 6)]
        >>> QDSwAVLoss()(scores, weight=torch.ones(4)).shape
        torch.Size([])
    """

    def __init__(self, temperature: float = 0.1, epsilon: float = 0.05, iterations: int = 3) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations

    def forward(
        self,
        high: Sequence[Tensor],
        low: Sequence[Tensor] = (),
        weight: Tensor | None = None,
        queue: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Weighted mean over samples, and over pairs of crops.

        Args:
            high: scores of the crops that are assigned.
            low: scores of further crops, which predict.
            weight: of each sample.
            queue: scores of earlier samples for each high crop, which take part in the assignment alone.
        """
        crops = [*high, *low]
        if len(crops) < 2:
            raise ValueError(f"expected two crops or more, got {len(crops)}")
        n = len(high[0])
        weight = check_weight(weight, n, device=high[0].device)
        total = high[0].new_zeros(())
        for i, scores in enumerate(high):
            together = scores.detach() if queue is None else torch.cat([scores.detach(), queue[i].detach()])
            q_nP = sinkhorn(together, epsilon=self.epsilon, iterations=self.iterations)[:n]
            part = high[0].new_zeros(())
            for v, other in enumerate(crops):
                if v != i:
                    each = -(q_nP * F.log_softmax(other / self.temperature, dim=1)).sum(dim=1)
                    part = part + weighted_mean(each, weight)
            total = total + part / (len(crops) - 1)
        return total / len(high)


class QDMultiPositiveLoss(nn.Module):
    """StableRep's loss for several views of an item, each pair of them weighted.

        l_k = -sum_j w_kj p_kj log softmax(<z_k, z_m>/T)_j,    p_kj = 1 / (number of k's positives)

    With two views of each item it is ``QDNTXentLoss``.

    Args:
        temperature: T (0.1).
        gather: compare with the views of all processes.

    Shapes: embeddings (B, D), labels (B,) int64 of the items (the same for all views of one), weight (B, B) of which only
        positive pairs count -> scalar.

    Raises:
        ValueError: a temperature of 0 or less; shapes that do not fit; an item with one view.

    Source: StableRep, arXiv 2306.00984, Eq. 3; weights: GenView++, arXiv 2509.23770.

    Example:
        >>> QDMultiPositiveLoss()(torch.randn(6, 8), torch.tensor([0, 0, 0, 1, 1, 1])).shape
        torch.Size([])
    """

    def __init__(self, temperature: float = 0.1, *, gather: bool = True) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.temperature, self.gather = temperature, gather

    def forward(self, embeddings: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
        """Weighted mean over views."""
        if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
            raise ValueError(f"embeddings {tuple(embeddings.shape)} and labels {tuple(labels.shape)} do not fit")
        size = len(labels)
        if weight is not None and weight.shape != (size, size):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, expected ({size}, {size}): one per pair of views"
            )
        z = unit(embeddings)
        together = self.gather and distributed.world_size() > 1
        all_z = gathered(z) if together else z
        all_labels = distributed.all_gather(labels) if together else labels
        offset = size * distributed.rank() if together else 0
        own = torch.arange(size, device=z.device)
        logits = (z @ all_z.T) / self.temperature
        logits[own, own + offset] = -torch.inf
        positives = labels[:, None] == all_labels[None]
        positives[own, own + offset] = False
        number = positives.sum(dim=1)
        if not bool((number > 0).all()):
            raise ValueError("an item has one view only: each needs two or more")
        log_p = F.log_softmax(logits, dim=1)
        p = positives.to(z.dtype) / number[:, None]
        if weight is not None:
            full = torch.ones_like(p)
            full[:, offset : offset + size] = weight.detach().to(p)
            p = p * full
        return -torch.where(positives, p * log_p, 0).sum(dim=1).mean()


def positive_weights(quality: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    """Weights of all pairs of views of one item, of mean 1 over them; 1 elsewhere.

        w_kj = exp(gamma q_kj) / mean over positive pairs of exp(gamma q)

    Shapes: ``quality`` (B, B), ``labels`` (B,) -> (B, B).
    Source: GenView++, arXiv 2509.23770 and the authors' scripts, gamma 2.
    """
    positives = (labels[:, None] == labels[None]) & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    q = quality.detach().float()
    e = (gamma * (q - q[positives].max())).exp()
    return torch.where(positives, e / e[positives].mean(), 1.0)


def image_text_qd_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor | float, weight: Tensor | None = None
) -> Tensor:
    """CLIP's loss, each (view, caption) pair weighted: mean of both directions' cross-entropies.

    Args:
        images: embeddings of views.
        texts: embeddings of their captions.
        logit_scale: inverse temperature, at most 100.
        weight: of each pair, ``pair_weights`` of ``cos(image, text) - cos(background of view, background of image)``.

    Shapes: (n, D), (n, D), weight (n,) -> scalar. On several processes all texts and images are compared.

    Raises:
        ValueError: images, texts or weights that do not fit.

    Source: CLIP, arXiv 2103.00020, figure 3; weights: GenView++, arXiv 2509.23770.

    Example:
        >>> images, texts = torch.nn.functional.normalize(torch.randn(2, 4, 8), dim=-1)
        >>> image_text_qd_loss(images, texts, 10.0, torch.ones(4)).shape
        torch.Size([])
    """
    _check_pairs(images, texts)
    weight = check_weight(weight, len(images), device=images.device)
    scale = torch.as_tensor(logit_scale, device=images.device).clamp(max=100.0)
    x, t = unit(images), unit(texts)
    own = torch.arange(len(x), device=x.device) + len(x) * distributed.rank()
    to_text = F.cross_entropy(scale * x @ gathered(t).T, own, reduction="none")
    to_image = F.cross_entropy(scale * t @ distributed.all_gather(x).T, own, reduction="none")
    return weighted_mean((to_text + to_image) / 2, weight)
