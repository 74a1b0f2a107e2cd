"""The student's own part of a training step: its losses as mmdet computes them, with what passes by on the way."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from head_kd.config import ProposalSettings
from head_kd.decoders import DenseDecoder
from head_kd.proposals import Proposals, Provenance, dense_proposals
from head_kd.regions import Regions, collect_regions
from head_kd.signals import capturing, gives_regions, resolve
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
    batch: Tensor,
    features: Sequence[Tensor],
    samples: list[Any],
    wanted: Sequence[str],
    decoder: DenseDecoder | None,
    settings: ProposalSettings,
) -> StudentPass:
    """The detector's own losses, and proposals from the same outputs of its head.

    Args:
        detector: the student.
        batch: images (N, 3, H, W).
        features: its maps of them.
        samples: mmdet's data sample of each image.
        wanted: signals to capture.
        decoder: makes boxes out of the head's outputs; None leaves proposals out.
        settings: how many boxes are proposed.
    """
    head = detector.bbox_head
    with capturing(resolve(head, wanted, "the student's head")) as seen, _outputs_of(head) as outputs:
        losses = _losses(detector, batch, features, samples)
    if decoder is None:
        return StudentPass(losses, seen, [])
    logits, predictions = ([t.detach() for t in part] for part in decoder.split(outputs[-1]))
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


def two_stage(
    detector: Any, batch: Tensor, features: Sequence[Tensor], samples: list[Any], wanted: Sequence[str]
) -> StudentPass:
    """The detector's own losses, with the regions that its RoI head samples and the activations of its box head.

    The head's own ``loss`` runs, whatever it is (Dynamic R-CNN's, PISA's, Double-Head's); its sampler is watched.

    Args:
        detector: the student.
        batch: images (N, 3, H, W).
        features: its maps of them.
        samples: mmdet's data sample of each image.
        wanted: signals to capture.

    Raises:
        UserError: the student has a mask head.
    """
    head = detector.roi_head
    if getattr(head, "with_mask", False):
        raise UserError("instance masks are not supported: take a student without mask head")
    proposals: list[Proposals] = []
    own_loss = head.loss

    def loss(x: Any, results: Any, *rest: Any, **more: Any) -> Any:
        proposals.extend(unlocated(r.bboxes.detach(), r.scores.detach()) for r in results)
        return own_loss(x, results, *rest, **more)

    with _instead(head, loss=loss):
        if not gives_regions(detector):
            return StudentPass(_losses(detector, batch, features, samples), {}, proposals)
        watched = _Watched(head.bbox_sampler)
        with (
            _instead(head, bbox_sampler=watched),
            capturing(resolve(head.bbox_head, wanted, "the student's box head")) as seen,
        ):
            losses = _losses(detector, batch, features, samples)
    counts = [len(sample.gt_instances.bboxes) for sample in samples]
    regions = collect_regions(watched.results, proposals, counts, watched.sampler.add_gt_as_proposals)
    # a sampler that mines hard examples asks the box head as well; the loss asks it last, with the regions themselves
    last = {name: values[-1:] for name, values in seen.items()}
    for name, values in last.items():
        if not values or len(values[0]) != len(regions.rois):
            raise UserError(
                f"the student's {type(head).__name__} does not run its box head on the regions that it samples, so"
                f" '{name}' has no target: set ckd_weight to 0"
            )
    return StudentPass(losses, last, proposals, regions)


class _Watched:
    """A sampler of regions that keeps what it gave; all else is the sampler's.

    Args:
        sampler: mmdet's sampler.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.results: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def sample(self, *args: Any, **more: Any) -> Any:
        """What the sampler gives; some give weights beside the regions."""
        found = self.sampler.sample(*args, **more)
        self.results.append(found[0] if isinstance(found, tuple) else found)
        return found


def _losses(detector: Any, batch: Tensor, features: Sequence[Tensor], samples: list[Any]) -> dict[str, Any]:
    """A detector's own ``loss`` on feature maps that are there already."""
    with _instead(detector, extract_feat=lambda _: tuple(features)):
        return dict(detector.loss(batch, samples))


@contextlib.contextmanager
def _instead(owner: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of an object that stand in for its own for a while."""
    kept = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    vars(owner).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(owner)[name]
        vars(owner).update(kept)


@contextlib.contextmanager
def _outputs_of(head: nn.Module) -> Iterator[list[Any]]:
    """What each call of a head gives."""
    outputs: list[Any] = []
    handle = head.register_forward_hook(lambda _, inputs, given: outputs.append(given))
    try:
        yield outputs
    finally:
        handle.remove()


def unlocated(boxes: Tensor, scores: Tensor) -> Proposals:
    """Proposals of one image that no cell of the student's head predicted."""
    return Proposals(boxes, scores, Provenance.none(len(boxes), boxes.device))
