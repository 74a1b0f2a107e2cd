"""The losses of PCKD and of its baselines: tensors in, tensors out.

Shape suffixes: B images, N = B V rows (image-major: row V b + v, view 0 is the upright one), C classes, S and T the widths
of the student's and the teacher's feature.
"""

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pckd.config import REFERENCE_EPOCHS, DKDConfig, FitNetConfig, KDConfig, PCKDConfig, Preview
from pckd.contrast import category_contrast
from tenfold import distributed


@dataclass(frozen=True)
class Outputs:
    """What a model gives for N rows, or the teacher for the upright ones.

    Attributes:
        logits: (N, C).
        feature: (N, D), the input of the last linear layer.
        weight: (C, D) of that layer; row c is the center of category c.
        bias: (C,) or None.
        hint: (N, K, H, W), an intermediate map, for FitNet.
    """

    logits: Tensor
    feature: Tensor
    weight: Tensor
    bias: Tensor | None = None
    hint: Tensor | None = None

    def detach(self) -> "Outputs":
        """Without gradients: what a teacher gives."""
        bias, hint = (None if x is None else x.detach() for x in (self.bias, self.hint))
        return Outputs(self.logits.detach(), self.feature.detach(), self.weight.detach(), bias, hint)


@dataclass(frozen=True)
class LossOutput:
    """The loss of one step.

    Attributes:
        total: scalar, to be minimized.
        terms: each term by name, without its weight, detached.
        ce: (B,) cross-entropy of each image's upright view, detached.
        gamma: (B,) the same over the batch's mean: difficulty.
        weights: (B,) preview weights v; ones where the method has none.
    """

    total: Tensor
    terms: dict[str, Tensor]
    ce: Tensor
    gamma: Tensor
    weights: Tensor


def difficulty(ce: Tensor, mean: Tensor | None = None) -> Tensor:
    """gamma_b = CE_b / mean(CE), in fp32 at least; ``mean`` of all devices where given. All zero gives zeros."""
    ce = ce if ce.dtype == torch.float64 else ce.float()
    return ce / (ce.mean() if mean is None else mean).clamp_min(1e-12)


def preview_weights(
    ce: Tensor,
    epoch: int,
    preview: Preview | None = None,
    *,
    epochs: int = REFERENCE_EPOCHS,
    mean: Tensor | None = None,
) -> Tensor:
    """Weight of each sample: v = 1 if gamma <= t_e, else exp(-gamma^2).

    gamma = CE / mean(CE), t_e = base^e. Below the threshold by one part in a million counts as below, so that equal
    samples all weigh 1.

    Args:
        ce: cross-entropy of each sample.
        epoch: 1-based.
        preview: settings; default the authors'.
        epochs: length of the run, which the schedule is scaled to.
        mean: mean cross-entropy to compare with, when ``ce`` is a part of the batch.

    Shapes: (B,) -> (B,) in (0, 1] (exp underflows to 0 far out), unless normalized.

    Raises:
        ValueError: the epoch is below 1.

    Example:
        >>> preview_weights(torch.tensor([1.0, 1.0, 4.0]), epoch=1)  # gamma = 0.5, 0.5, 2; exp(-4) = 0.0183
        tensor([1.0000, 1.0000, 0.0183])
    """
    preview = preview or Preview()
    threshold = preview.threshold(epoch, epochs)
    gamma = difficulty(ce, mean)
    if preview.tail == "none":
        return torch.ones_like(gamma)
    tail = (-gamma.square()).exp() if preview.tail == "exp2" else (1 - (gamma / threshold).square()).exp()
    v = torch.where(gamma <= threshold * (1 + 1e-6), torch.ones_like(gamma), tail)
    if preview.normalize:
        v = v / v.mean().clamp_min(1e-12)
    return v.detach() if preview.detach else v


def kd_per_sample(student: Tensor, teacher: Tensor, T: float = 4.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of each row (arXiv 1503.02531). (B, C), (B, C) -> (B,).

    Example:
        >>> kd_per_sample(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor([0., 0.])
    """
    if not T > 0:
        raise ValueError(f"T must be above 0, got {T}")
    log_s, log_t = F.log_softmax(student.float() / T, dim=1), F.log_softmax(teacher.float() / T, dim=1)
    return T * T * (log_t.exp() * (log_t - log_s)).sum(dim=1)


def dkd_per_sample(
    student: Tensor, teacher: Tensor, labels: Tensor, T: float = 4.0, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """alpha TCKD + beta NCKD of each row (arXiv 2203.08679).

    TCKD = T^2 KL([q_t, 1 - q_t] || [q_s, 1 - q_s]) with q the target's probability; NCKD = T^2 KL of the softmaxes over the
    other C - 1 classes. From logarithms throughout, so that a certain teacher gives no infinity.

    Shapes: (B, C), (B, C), (B,) -> (B,).

    Example:
        >>> logits = torch.randn(4, 10)
        >>> dkd_per_sample(logits, logits, torch.tensor([0, 1, 2, 3])).abs().max() < 1e-4
        tensor(True)
    """
    target = F.one_hot(labels, student.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits.float() / T, dim=1)
        others = log_p[~target].view(len(log_p), -1)
        rest = others.logsumexp(dim=1, keepdim=True)
        return torch.cat([log_p[target][:, None], rest], dim=1), others - rest

    (binary_s, others_s), (binary_t, others_t) = parts(student), parts(teacher)
    tckd = (binary_t.exp() * (binary_t - binary_s)).sum(dim=1)
    nckd = (others_t.exp() * (others_t - others_s)).sum(dim=1)
    return T * T * (alpha * tckd + beta * nckd)


class FeatureAlignLoss(nn.Module):
    """Bring the student's feature, through an MLP g, to the direction of the teacher's.

        L_FA = 2 - 2 mean_n cos(g(F_s[n]), F_t[n])  in [0, 4],    g = Linear, BatchNorm, ReLU, Linear

    Args:
        student_dim: S.
        teacher_dim: T.
        hidden: width between the two layers; 16 T in the authors' code.

    Shapes: (N, S), (N, T) -> scalar. Source: the paper's figure and the authors' code; the layers of g are those of the
    projector of BYOL with the same arguments (assumed).

    Example:
        >>> loss = FeatureAlignLoss(student_dim=8, teacher_dim=16, hidden=32)(torch.randn(4, 8), torch.randn(4, 16))
        >>> bool(0 <= loss <= 4)
        True
    """

    def __init__(self, student_dim: int, teacher_dim: int, hidden: int) -> None:
        super().__init__()
        self.g = nn.Sequential(
            nn.Linear(student_dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, teacher_dim)
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Features of the same rows -> the loss."""
        if self.training and len(student) < 2:
            raise ValueError(
                "a batch of one row cannot be normalized by the alignment's BatchNorm: take two rows or more"
            )
        return feature_distance(self.g(student), teacher)


def feature_distance(a: Tensor, b: Tensor) -> Tensor:
    """2 - 2 mean cos(a, b) over rows: the mean squared distance of the unit vectors. (N, D), (N, D) -> scalar."""
    return 2 - 2 * F.cosine_similarity(a.float(), b.float(), dim=1).mean()


class CenterAlignLoss(nn.Module):
    """Bring the student's category centers (and biases) to the teacher's.

    same-dim: the mean of the squared entries of [W_s | b_s] - [W_t | b_t] where the widths are equal, else 0 with one
    warning (the authors' code is silently 0). gram: the mean squared difference of the cosines between centers, (C, C), for
    any widths, unchanged when either's space is rotated (ours).

    Shapes: (C, S), (C,) or None, (C, T), (C,) or None -> scalar.

    Example:
        >>> CenterAlignLoss()(torch.zeros(2, 4), None, torch.full((2, 4), 2.0), None)
        tensor(4.)
    """

    def __init__(self, kind: str = "same-dim") -> None:
        super().__init__()
        self.kind = kind
        self._warned = False

    def forward(self, weight: Tensor, bias: Tensor | None, teacher: Tensor, teacher_bias: Tensor | None) -> Tensor:
        """Student's and teacher's centers -> the loss."""
        teacher = teacher.detach()
        if self.kind == "gram":
            a, b = F.normalize(weight, dim=1), F.normalize(teacher, dim=1)
            return F.mse_loss(a @ a.T, b @ b.T)
        if weight.shape != teacher.shape:
            if not self._warned:
                warnings.warn(
                    f"center alignment is off: the student's feature has {weight.shape[1]} dimensions, the teacher's"
                    f" {teacher.shape[1]}; center_align='gram' compares centers of any width",
                    stacklevel=2,
                )
                self._warned = True
            return weight.new_zeros(())
        if bias is None or teacher_bias is None:
            return F.mse_loss(weight, teacher)
        ours = torch.cat([weight, bias[:, None]], dim=1)
        return F.mse_loss(ours, torch.cat([teacher, teacher_bias.detach()[:, None]], dim=1))


class CategoryContrastLoss(nn.Module):
    """Contrast of the student's features against both sets of category centers.

        u = norm(E_s F_s),  q = norm(E_t F_s)
        relation: A = [u W_s^T ; q W_t^T], c_n = ell_n + ell_{n + N} of ``category_contrast``
        center:   c_n = CE(q . norm(W_t) / tau, y) + CE(u . norm(W_s) / tau, y)

    relation is the authors' code, center our reading of the paper's figure. The gradient reaches the student, E_s, E_t and
    W_s, never the teacher.

    Args:
        student_dim: S.
        teacher_dim: T.
        config: tau, tau0, contrast, normalize_relations, eps, gram, gather.

    Shapes: feature (N, S), weight (C, S), teacher's weight (C, T), labels (N,) -> (N,), one loss a row; with ``gather``,
    of the rows of all devices.

    Example:
        >>> contrast = CategoryContrastLoss(student_dim=8, teacher_dim=16)
        >>> feature, labels = torch.randn(6, 8), torch.tensor([0, 0, 1, 1, 2, 2])
        >>> contrast(feature, torch.randn(3, 8), torch.randn(3, 16), labels).shape
        torch.Size([6])
    """

    def __init__(self, student_dim: int, teacher_dim: int, config: PCKDConfig | None = None) -> None:
        super().__init__()
        self.config = config or PCKDConfig()
        self.to_student = nn.Linear(student_dim, student_dim)
        self.to_teacher = nn.Linear(student_dim, teacher_dim)

    def forward(self, feature: Tensor, weight: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Features, both sets of centers and labels -> a loss a row."""
        teacher = teacher.detach()
        u_NS = F.normalize(self.to_student(feature), dim=1)
        q_NT = F.normalize(self.to_teacher(feature), dim=1)
        config = self.config
        if config.contrast == "center":
            own = u_NS @ F.normalize(weight, dim=1).T / config.tau
            other = q_NT @ F.normalize(teacher.to(q_NT.dtype), dim=1).T / config.tau
            return F.cross_entropy(own, labels, reduction="none") + F.cross_entropy(other, labels, reduction="none")
        gram = None
        wide = len(weight) > u_NS.shape[1] + q_NT.shape[1]
        if config.gram == "always" or (config.gram == "auto" and wide and not config.normalize_relations):
            halves = [F.pad(u_NS, (0, q_NT.shape[1])), F.pad(q_NT, (u_NS.shape[1], 0))]
            both = torch.cat([weight, teacher.to(weight.dtype)], dim=1)
            gram = both.T @ both
        else:
            halves = [u_NS @ weight.T, q_NT @ teacher.to(q_NT.dtype).T]
            if config.normalize_relations:
                halves = [F.normalize(half, dim=1) for half in halves]
        if config.gather and distributed.world_size() > 1:
            halves = [distributed.all_gather(half.contiguous()) for half in halves]
            labels = distributed.all_gather(labels)
        ell = category_contrast(
            torch.cat(halves), labels.repeat(2), config.tau, config.tau0, gram=gram, eps=config.eps
        ).view(2, -1)
        return ell.sum(dim=0)


class Objective(nn.Module):
    """A method's loss on top of one forward of student and teacher; its submodules are trained with the student.

    Attributes:
        teacher_rows: what the teacher has to be run on: "all" views, the "upright" one, or "none".
        hints: whether intermediate maps are needed.
        label_smoothing: share of the labels that is spread over all classes in the cross-entropy; the difficulty of a
            sample is measured without it.
    """

    teacher_rows = "none"
    hints = False
    label_smoothing = 0.0

    def forward(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, epoch: int, epochs: int = REFERENCE_EPOCHS
    ) -> LossOutput:
        """The loss of N = B V rows in image-major order; labels are (B,), soft ones (B, C); ``epoch`` is 1-based."""
        raise NotImplementedError

    def cross_entropy(self, logits: Tensor, labels: Tensor, plain: Tensor) -> Tensor:
        """Mean cross-entropy with smoothed labels; ``plain`` is that of each row without."""
        if not self.label_smoothing:
            return plain.mean()
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


def check_batch(student: Outputs, teacher: Outputs | None, labels: Tensor) -> int:
    """Views of an image, after a look at shapes and labels that needs no knowledge of the method.

    Raises:
        ValueError: a label outside of the classes, soft labels that are not (B, C), other classes in the teacher, a feature
            that is not (N, D), rows that are no multiple of the labels.
        FloatingPointError: the teacher's logits hold NaN or infinity.
    """
    rows, classes = student.logits.shape
    if student.feature.ndim != 2:
        raise ValueError(f"the tapped feature must be (N, D), got {tuple(student.feature.shape)}")
    views = rows // max(len(labels), 1)
    if views * len(labels) != rows or not rows:
        raise ValueError(f"{rows} rows are no multiple of {len(labels)} labels: N = B V is needed")
    if labels.ndim == 2 and labels.shape[1] != classes:
        raise ValueError(f"soft labels must be (B, {classes}), got {tuple(labels.shape)}")
    outside = (labels < 0) | (labels >= classes)
    if labels.ndim == 1 and bool(outside.any()):
        raise ValueError(f"label {int(labels[outside][0])} is outside of [0, {classes})")
    if teacher is not None:
        if teacher.logits.shape[1] != classes:
            raise ValueError(f"the teacher has {teacher.logits.shape[1]} classes, the student {classes}")
        if not bool(torch.isfinite(teacher.logits).all()):
            raise FloatingPointError(f"the teacher's logits of a batch of {len(labels)} images hold NaN or infinity")
    return views


def _hard(labels: Tensor, term: str) -> None:
    if labels.ndim != 1:
        raise ValueError(f"{term} asks for one class per image, got soft labels {tuple(labels.shape)}")


def _measured(student: Outputs, labels: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Upright logits, cross-entropy (B,), its mean over all devices, gamma."""
    upright = student.logits[::views] if views > 1 else student.logits
    ce = F.cross_entropy(upright, labels, reduction="none")
    mean = ce.detach().mean()
    if distributed.world_size() > 1:
        sums = distributed.all_reduce_sums({"ce": ce.sum(), "count": ce.new_tensor(float(len(ce)))})
        mean = sums["ce"] / sums["count"]
    return upright, ce, mean, difficulty(ce.detach(), mean)


class PCKDLoss(Objective):
    """L_CE + delta L_KD + beta L_CC + alpha L_CA + f L_FA; preview weighs L_KD and L_CC.

        L_KD = (1/B) sum_b v_b KD_b        L_CC = (1/N) sum_n v_b(n) c_n

    Heads whose weight is zero are not built, so nothing is left without a gradient under DDP.

    Args:
        student_dim: S.
        teacher_dim: T.
        config: settings.

    Source: Ding et al., "Preview-based Category Contrastive Learning for Knowledge Distillation", TCSVT 2025,
    arXiv 2410.14143, and the authors' code where the two leave a choice.

    Example:
        >>> student, teacher = (Outputs(torch.randn(6, 3), torch.randn(6, d), torch.randn(3, d)) for d in (8, 16))
        >>> objective = PCKDLoss(student_dim=8, teacher_dim=16)
        >>> loss = objective(student, teacher, torch.tensor([0, 0, 1, 1, 2, 2]), epoch=1, epochs=240)
        >>> loss.total.shape, loss.weights.shape
        (torch.Size([]), torch.Size([6]))
    """

    def __init__(self, student_dim: int, teacher_dim: int, config: PCKDConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PCKDConfig()
        hidden = config.hidden_width(teacher_dim)
        if config.f and hidden > 4096:
            warnings.warn(
                f"the alignment head has {hidden} hidden units, {hidden * (student_dim + teacher_dim) / 1e6:.0f} million"
                " weights; align_hidden='auto' caps it at 4096",
                stacklevel=2,
            )
        self.feature_align = FeatureAlignLoss(student_dim, teacher_dim, hidden) if config.f else None
        self.center_align = CenterAlignLoss(config.center_align) if config.alpha else None
        self.contrast = CategoryContrastLoss(student_dim, teacher_dim, config) if config.beta else None
        needs_teacher = config.delta or config.alpha or config.beta
        self.teacher_rows = "all" if config.f else "upright" if needs_teacher else "none"

    def forward(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, epoch: int, epochs: int = REFERENCE_EPOCHS
    ) -> LossOutput:
        """See ``Objective``."""
        config = self.config
        views = check_batch(student, teacher, labels)
        _hard(labels, "the category contrast")
        upright, ce, mean, gamma = _measured(student, labels, views)
        total = self.cross_entropy(upright, labels, ce)
        terms = {"ce": total.detach()}
        preview = config.preview
        v = preview_weights(ce.detach() if preview.detach else ce, epoch, preview, epochs=epochs, mean=mean)
        one = torch.ones_like(v)
        if self.teacher_rows != "none" and teacher is None:
            raise ValueError("a weight above 0 needs the teacher's outputs")
        if teacher is not None:
            teacher = teacher.detach()
            upright_t = teacher.logits[:: len(teacher.logits) // len(labels)]
            if config.delta:
                kd = ((v if "kd" in preview.targets else one) * kd_per_sample(upright, upright_t, config.T)).mean()
                total, terms["kd"] = total + config.delta * kd, kd.detach()
            if self.contrast is not None:
                rows = labels.repeat_interleave(views)
                each = self.contrast(student.feature, student.weight, teacher.weight, rows)
                weight = (v if "cc" in preview.targets else one).detach().repeat_interleave(views)
                if len(each) > len(weight):
                    weight = distributed.all_gather(weight)
                cc = (weight * each).mean()
                total, terms["cc"] = total + config.beta * cc, cc.detach()
            if self.center_align is not None:
                ca = self.center_align(student.weight, student.bias, teacher.weight, teacher.bias)
                total, terms["ca"] = total + config.alpha * ca, ca.detach()
            if self.feature_align is not None:
                fa = self.feature_align(student.feature, teacher.feature)
                total, terms["fa"] = total + config.f * fa, fa.detach()
        return LossOutput(total, terms, ce.detach(), gamma, v.detach())


class BaselineLoss(Objective):
    """Cross-entropy with, or without, a term of the logits or of an intermediate map: ce, kd, dkd, fitnet.

    On the same views and the same batch as PCKD, the upright view alone in the loss, as there.

    Args:
        method: one of the four.
        kd: of kd.
        dkd: of dkd.
        fitnet: of fitnet.
        channels: of the student's and the teacher's map, for fitnet.
    """

    def __init__(
        self,
        method: str,
        *,
        kd: KDConfig | None = None,
        dkd: DKDConfig | None = None,
        fitnet: FitNetConfig | None = None,
        channels: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.method = method
        self.kd, self.dkd, self.fitnet = kd or KDConfig(), dkd or DKDConfig(), fitnet or FitNetConfig()
        self.teacher_rows = {"ce": "none", "fitnet": "all"}.get(method, "upright")
        self.hints = method == "fitnet"
        self.regressor: nn.Module | None = None
        if self.hints:
            assert channels is not None
            self.regressor = nn.Sequential(nn.Conv2d(*channels, 1), nn.BatchNorm2d(channels[1]), nn.ReLU())

    def forward(
        self, student: Outputs, teacher: Outputs | None, labels: Tensor, epoch: int, epochs: int = REFERENCE_EPOCHS
    ) -> LossOutput:
        """See ``Objective``."""
        views = check_batch(student, teacher, labels)
        upright, ce, _, gamma = _measured(student, labels, views)
        total = self.cross_entropy(upright, labels, ce)
        terms = {"ce": total.detach()}
        if self.method != "ce":
            assert teacher is not None
            teacher = teacher.detach()
            upright_t = teacher.logits[:: len(teacher.logits) // len(labels)]
            if self.method == "kd":
                term = kd_per_sample(upright, upright_t, self.kd.T).mean()
                total = self.kd.ce * total + self.kd.kd * term
            elif self.method == "dkd":
                _hard(labels, "dkd")
                each = dkd_per_sample(upright, upright_t, labels, self.dkd.T, self.dkd.alpha, self.dkd.beta)
                rise = self.dkd.warm_up * epochs / REFERENCE_EPOCHS
                term = min(epoch / rise, 1.0) * each.mean() if rise else each.mean()
                total = total + term
            else:
                assert self.regressor is not None and student.hint is not None and teacher.hint is not None  # noqa: PT018
                ours, theirs = student.hint, teacher.hint
                sides = (min(ours.shape[-2], theirs.shape[-2]), min(ours.shape[-1], theirs.shape[-1]))
                ours, theirs = (F.adaptive_avg_pool2d(x, sides) if x.shape[-2:] != sides else x for x in (ours, theirs))
                term = F.mse_loss(self.regressor(ours), theirs)
                total = total + self.fitnet.weight * term
            terms[self.method] = term.detach()
        return LossOutput(total, terms, ce.detach(), gamma, torch.ones_like(gamma))


def with_terms(config: PCKDConfig, method: str) -> PCKDConfig:
    """The settings of an arm: ``ckd`` has no preview, ``pckd-nokd`` no term of the logits."""
    changes: dict[str, Any] = {}
    if method == "ckd":
        changes["preview"] = replace(config.preview, tail="none")
    if method == "pckd-nokd":
        changes["delta"] = 0.0
    return replace(config, **changes)
