"""The regions that a RoI head works on: sampled as mmdet samples them, and followed back to the cells they come from."""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from head_kd.proposals import Proposals, Provenance


@dataclasses.dataclass(frozen=True)
class Regions:
    """The M regions of a batch: positives then negatives of each image, images in order.

    Attributes:
        sampling: mmdet's sampling result of each image.
        rois: (M, 5) image, x1, y1, x2, y2.
        positive: (M,) bool.
        provenance: the cells that the M regions come from.
        index: (M,) row in the list of proposals that was sampled from; below 0 for ground truth that was added.
    """

    sampling: list[Any]
    rois: Tensor
    positive: Tensor
    provenance: Provenance
    index: Tensor

    @property
    def image(self) -> Tensor:
        """(M,) number of the image."""
        return self.rois[:, 0].long()


def collect_regions(
    sampling: Sequence[Any], proposals: Sequence[Proposals], ground_truth: Sequence[int], added: bool
) -> Regions:
    """Follow sampled rows back to the proposals that they were.

    A sampler's indices count ground truth first where it adds it as proposals, then the proposals.

    Args:
        sampling: mmdet's sampling result of each image.
        proposals: the proposals that were sampled from.
        ground_truth: number of boxes of each image.
        added: whether the sampler adds ground truth.
    """
    rois, positive, provenance, index = [], [], [], []
    for number, (result, proposed, boxes) in enumerate(zip(sampling, proposals, ground_truth, strict=True)):
        offset = boxes if added else 0
        rows = torch.cat([result.pos_inds, result.neg_inds]) - offset
        known = Provenance.cat([proposed.provenance, Provenance.none(1, rows.device)])
        provenance.append(known[torch.where(rows < 0, len(proposed.provenance), rows)])
        index.append(rows)
        positive.append(torch.arange(len(rows), device=rows.device) < len(result.pos_inds))
        priors = result.priors
        rois.append(torch.cat([priors.new_full((len(priors), 1), number), priors], dim=1))
    return Regions(list(sampling), torch.cat(rois), torch.cat(positive), Provenance.cat(provenance), torch.cat(index))


def sample_regions(
    assigner: Any, sampler: Any, proposals: Sequence[Proposals], samples: Sequence[Any], features: Sequence[Tensor]
) -> Regions:
    """Assign proposals to ground truth and sample them, as mmdet's RoI heads do.

    Args:
        assigner: mmdet's assigner.
        sampler: mmdet's sampler.
        proposals: candidates of each image.
        samples: mmdet's data sample of each image.
        features: maps, for samplers that look at them.
    """
    results, counts = [], []
    for i, (proposed, sample) in enumerate(zip(proposals, samples, strict=True)):
        instances = InstanceData(priors=proposed.boxes, scores=proposed.scores)
        truth = sample.gt_instances
        assigned = assigner.assign(instances, truth, sample.get("ignored_instances"))
        counts.append(len(truth.bboxes))
        results.append(sampler.sample(assigned, instances, truth, feats=[level[i][None] for level in features]))
    return collect_regions(results, proposals, counts, sampler.add_gt_as_proposals)
