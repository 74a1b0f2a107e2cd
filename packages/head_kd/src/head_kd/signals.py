"""Where a detector's knowledge can be read: names for inner activations of mmdet's heads.

An activation is captured as the *input of the module that consumes it*. Behind an in-place ReLU a hook on the layer
itself would see the value before or after the ReLU, depending on a flag; the consumer sees what the head really uses.
"""

import head_kd.ops_fallback  # noqa: F401  # before mmdet

# isort: split
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.utils import unpack_gt_instances
from torch import Tensor, nn

from tenfold import UserError
from tenfold.errors import did_you_mean

_CLASSIFIERS = (
    "retina_cls", "conv_cls", "atss_cls", "gfl_cls", "rpn_cls", "rtm_cls", "tood_cls", "vfnet_cls", "multi_level_conv_cls",
    "cls_score",
)  # fmt: skip
_REGRESSORS = (
    "retina_reg", "conv_reg", "atss_reg", "gfl_reg", "rpn_reg", "rtm_reg", "tood_reg", "vfnet_reg", "multi_level_conv_reg",
    "bbox_pred",
)  # fmt: skip
_BOX_PREDICTORS = ("fc_cls", "fc_reg")
_REPPOINTS = {
    "cls_tower": "reppoints_cls_conv",
    "reg_tower": "reppoints_pts_init_conv",
    "pts_init": "reppoints_pts_init_out",
    "cls": "reppoints_cls_out",
    "pts_refine": "reppoints_pts_refine_out",
}


def head_signals(head: nn.Module) -> dict[str, str]:
    """The activations of a head that have a name: name -> path of the module that consumes it.

    A box head of an R-CNN has ``fc1`` ... ``fcK``, its shared fully connected layers after their ReLU. A dense head has
    ``cls_tower`` and ``reg_tower``, what its last convolutions see; a RepPoints head three more.
    """
    shared = getattr(head, "shared_fcs", None)
    if shared is not None and len(shared):
        after = next(
            (f"{branch}.0" for branch in ("cls_convs", "cls_fcs") if len(getattr(head, branch, None) or ())), "fc_cls"
        )
        consumers = [f"shared_fcs.{i}" for i in range(1, len(shared))] + [after]
        return {f"fc{i + 1}": path for i, path in enumerate(consumers)}
    for branch in ("fc_branch", "cls_fcs"):  # Double-Head's, and those of heads that share no layer
        layers = getattr(head, branch, None)
        if layers is not None and len(layers):
            consumers = [f"{branch}.{i}" for i in range(1, len(layers))] + ["fc_cls"]
            return {f"fc{i + 1}": path for i, path in enumerate(consumers)}
    if hasattr(head, "reppoints_cls_out"):
        return dict(_REPPOINTS)
    found = {}
    for name, candidates in (("cls_tower", _CLASSIFIERS), ("reg_tower", _REGRESSORS)):
        path = next((c for c in candidates if isinstance(getattr(head, c, None), nn.Module)), None)
        if path is not None:
            found[name] = path
    return found


def predictors(head: nn.Module) -> tuple[str, ...]:
    """The modules of a head that predict classes and boxes; no signal depends on what they hold."""
    names = (*_BOX_PREDICTORS, *_CLASSIFIERS, *_REGRESSORS)
    return tuple(name for name in names if isinstance(getattr(head, name, None), nn.Module))


def resolve(head: nn.Module, names: Sequence[str], owner: str) -> dict[str, nn.Module]:
    """The consumers of the named activations; a name may also be the path of a module of the head.

    Raises:
        UserError: the head has no such signal; the message holds the nearest names.
    """
    known = head_signals(head)
    modules = dict(head.named_modules())
    found = {}
    for name in names:
        path = known.get(name, name)
        if path not in modules or not path:
            what = f"{owner} ({type(head).__name__}) has no signal"
            if not name:
                raise UserError(f"{what} of a known name: name a module of it, or set the weight of that term to 0")
            raise UserError(f"{what} '{name}': {did_you_mean(name, known or [m for m in modules if m][:400])}")
        found[name] = modules[path]
    return found


@contextlib.contextmanager
def capturing(consumers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the first input of each consumer, one entry per call (a dense head calls it once per level).

    A consumer that is a list of modules has one for each level, which are called in order.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in consumers}
    handles: list[Any] = []
    for name, module in consumers.items():

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            seen[name].append(inputs[0])

        parts = list(module) if isinstance(module, nn.ModuleList) else [module]
        handles += [part.register_forward_pre_hook(keep) for part in parts]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def detector_strides(detector: Any) -> list[int]:
    """Strides of the maps that a detector's neck gives, as its dense head or RPN states them."""
    head = getattr(detector, "bbox_head", None) or getattr(detector, "rpn_head", None)
    generator = getattr(head, "prior_generator", None)
    if generator is None:
        raise UserError(f"{type(detector).__name__} has no dense head or RPN that states its strides")
    return [int(stride[0]) if isinstance(stride, tuple | list) else int(stride) for stride in generator.strides]


def neck_channels(detector: Any) -> int:
    """Channels of the maps that a detector's neck gives.

    Raises:
        UserError: neither the neck nor the head on it says how many.
    """
    channels = getattr(getattr(detector, "neck", None), "out_channels", None)
    if channels is None:
        head = getattr(detector, "bbox_head", None) or detector.rpn_head
        channels = getattr(head, "in_channels", None)
    if not isinstance(channels, int):
        raise UserError(f"{type(detector).__name__}: its neck does not say how many channels it gives")
    return channels


def num_classes(detector: Any) -> int:
    """Number of classes of a detector's final head."""
    head: Any = box_heads(detector.roi_head)[0] if is_two_stage(detector) else detector.bbox_head
    return int(head.num_classes)


def is_two_stage(detector: Any) -> bool:
    """Whether a detector has a RoI head."""
    return getattr(detector, "roi_head", None) is not None


def gives_regions(detector: Any) -> bool:
    """Whether a two-stage detector samples its regions once, so that they can be shared (a cascade does not)."""
    return isinstance(detector.roi_head, StandardRoIHead)


def box_heads(roi_head: Any) -> list[nn.Module]:
    """The box head of each stage: one for an R-CNN, several for a cascade."""
    heads = roi_head.bbox_head
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]


def forward_stage(roi_head: Any, stage: int, features: Sequence[Tensor], rois: Tensor) -> Any:
    """``_bbox_forward`` of a RoI head, whether it counts stages or not."""
    if isinstance(roi_head.bbox_head, nn.ModuleList):
        return roi_head._bbox_forward(stage, features, rois)
    return roi_head._bbox_forward(features, rois)


def dense_losses(head: Any, outputs: Any, samples: Sequence[Any]) -> dict[str, Tensor]:
    """A dense head's losses out of outputs that are there already."""
    truth, ignored, metas = unpack_gt_instances(list(samples))
    return dict(head.loss_by_feat(*outputs, truth, metas, ignored))
