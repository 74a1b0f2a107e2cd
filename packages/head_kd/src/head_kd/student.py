"""The student's own part of a training step: its losses as mmdet computes them, with what passes by on the way."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from head_kd.config import ProposalSettings
from head_kd.proposals import Proposals, Provenance, dense_proposals
from head_kd.regions import Regions, sample_regions
from head_kd.signals import DenseDecoder, capturing, dense_losses, gives_regions, resolve
from tenfold import UserError


@dataclasses.dataclass(frozen=True)
class StudentPass:
    """What a student's heads gave on a batch.

    Attributes:
        losses: detection losses by mmdet's names.
        signals: the wanted activations by name.
        proposals: candidate regions of each image; empty where none were asked for.
        regions: the regions that a two-stage student sampled, where it samples once.
    """

    losses: dict[str, Any]
    signals: dict[str, list[Tensor]]
    proposals: list[Proposals]
    regions: Regions | None = None


def one_stage(
    detector: Any,
    features: Sequence[Tensor],
    samples: list[Any],
    wanted: Sequence[str],
    decoder: DenseDecoder | None,
    settings: ProposalSettings,
) -> StudentPass:
    """A dense head's losses, and its proposals from the same outputs.

    Args:
        detector: the student.
        features: its maps.
        samples: mmdet's data sample of each image.
        wanted: signals to capture.
        decoder: makes boxes out of the head's outputs; None leaves proposals out.
        settings: how many boxes are proposed.
    """
    head = detector.bbox_head
    with capturing(resolve(head, wanted, "the student's head")) as seen:
        outputs = head(tuple(features))
    losses = dense_losses(head, outputs, samples)
    if decoder is None:
        return StudentPass(losses, seen, [])
    logits, predictions = [t.detach() for t in outputs[0]], [t.detach() for t in outputs[1]]
    sizes = [(t.shape[2], t.shape[3]) for t in logits]
    proposals = dense_proposals(
        logits,
        predictions,
        decoder.priors(sizes, logits[0].device),
        decoder.decode,
        [s.metainfo["img_shape"][:2] for s in samples],
        **dataclasses.asdict(settings),
    )
    return StudentPass(losses, seen, proposals)


def two_stage(detector: Any, features: Sequence[Tensor], samples: list[Any], wanted: Sequence[str]) -> StudentPass:
    """RPN and RoI head, step by step as in mmdet, so that regions and activations are seen.

    Args:
        detector: the student.
        features: its maps.
        samples: mmdet's data sample of each image.
        wanted: signals to capture.

    Raises:
        UserError: the student has a mask head.
    """
    if getattr(detector.roi_head, "with_mask", False):
        raise UserError("instance masks are not supported: take a student without mask head")
    settings = detector.train_cfg.get("rpn_proposal", detector.test_cfg.rpn)
    rpn_samples = copy.deepcopy(samples)
    for sample in rpn_samples:
        sample.gt_instances.labels = torch.zeros_like(sample.gt_instances.labels)
    rpn_losses, results = detector.rpn_head.loss_and_predict(tuple(features), rpn_samples, proposal_cfg=settings)
    losses = {(f"rpn_{k}" if "loss" in k and "rpn" not in k else k): v for k, v in rpn_losses.items()}
    proposals = [unlocated(r.bboxes.detach(), r.scores.detach()) for r in results]
    head = detector.roi_head
    if not gives_regions(detector):
        return StudentPass(losses | head.loss(tuple(features), results, samples), {}, proposals)
    regions = sample_regions(head.bbox_assigner, head.bbox_sampler, proposals, samples, features)
    with capturing(resolve(head.bbox_head, wanted, "the student's box head")) as seen:
        losses |= head.bbox_loss(tuple(features), regions.sampling)["loss_bbox"]
    return StudentPass(losses, seen, proposals, regions)


def unlocated(boxes: Tensor, scores: Tensor) -> Proposals:
    """Proposals of one image that no cell of the student's head predicted."""
    return Proposals(boxes, scores, Provenance.none(len(boxes), boxes.device))
