"""Hot spots against mmdet's and mmcv's own paths: proposals, gathering, operators; and what a step and a student cost.

``python benchmarks/speed.py --out FILE``. Equality is checked before anything is timed.
"""

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import head_kd.ops_fallback  # noqa: F401
import mmcv
import mmdet
import torch
import torchvision
from head_kd import rendered, small, stack
from head_kd.cache import write_cache
from head_kd.configs import resolve_config
from head_kd.decoders import dense_decoder
from head_kd.detector import HEADDetector
from head_kd.inspection import training_flops
from head_kd.proposals import Provenance, dense_proposals, gather_at
from head_kd.teacher import TeacherView
from mmcv.ops import RoIAlign, nms
from mmdet.models.dense_heads import RPNHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from tenfold import bench

ANCHORS = {
    "type": "AnchorGenerator",
    "octave_base_scale": 4,
    "scales_per_octave": 3,
    "ratios": [0.5, 1.0, 2.0],
    "strides": [8, 16, 32, 64, 128],
}
CODER = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4, "target_stds": [1.0] * 4}


def proposals(images: int, side: int, classes: int) -> bench.Comparison:
    """A batch at once, against mmdet's RPN post-processing, which goes image by image and level by level."""
    head = MODELS.build(
        ConfigDict(
            type="RetinaHead",
            num_classes=classes,
            in_channels=8,
            feat_channels=8,
            stacked_convs=1,
            anchor_generator=ANCHORS,
            bbox_coder=CODER,
        )
    )
    rpn = RPNHead(in_channels=8, num_classes=1, anchor_generator=dict(ANCHORS), bbox_coder=dict(CODER))
    sizes = [(-(-side // s), -(-side // s)) for s in ANCHORS["strides"]]
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn((images, 9 * classes, h, w), generator=generator) for h, w in sizes]
    boxes = [0.2 * torch.randn((images, 36, h, w), generator=generator) for h, w in sizes]
    decoder = dense_decoder(head)
    cfg = ConfigDict(nms_pre=2000, max_per_img=1000, nms={"type": "nms", "iou_threshold": 0.7}, min_bbox_size=0)
    metas = [{"img_shape": (side, side), "scale_factor": (1.0, 1.0)}] * images

    def ours() -> list[Any]:
        priors = decoder.priors(sizes, torch.device("cpu"))
        return dense_proposals(logits, boxes, priors, decoder.decode, [(side, side)] * images)

    def peer() -> list[Any]:
        best = [t.view(images, 9, classes, *t.shape[2:]).amax(dim=2) for t in logits]
        return rpn.predict_by_feat(best, boxes, batch_img_metas=metas, cfg=cfg, rescale=False)

    def equal(a: list[Any], b: list[Any]) -> str:
        """Every box of ours is the peer's, with its score; in order but where the last bit of a sigmoid decides it."""
        for x, y in zip(a, b, strict=True):
            ours, theirs = (
                torch.cat([p, 1000 * s[:, None]], dim=1) for p, s in ((x.boxes, x.scores), (y.bboxes, y.scores))
            )
            assert len(ours) == len(theirs)
            nearest = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist").amin(dim=1)
            assert float(nearest.max()) < 1e-3
        return f"all {sum(len(x.scores) for x in a)} boxes (to 0.001 pixels) and scores (to 1e-6)"

    with torch.no_grad():
        return bench.compare(
            f"proposals_{side}px",
            ours,
            peer,
            equal,
            shape=f"{images} images {side}x{side}, {classes} classes, 9 anchors",
            required=">= 3",
            pairs=7,
        )


def gathering() -> bench.Comparison:
    """Direct indexing, against permuting all maps and indexing the result; forward and backward."""
    sizes = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]
    maps = [torch.randn(2, 256, h, w, requires_grad=True) for h, w in sizes]
    rows = 1024
    generator = torch.Generator().manual_seed(0)
    level = torch.randint(5, (rows,), generator=generator)
    y = torch.tensor([int(torch.randint(sizes[i][0], (1,), generator=generator)) for i in level.tolist()])
    x = torch.tensor([int(torch.randint(sizes[i][1], (1,), generator=generator)) for i in level.tolist()])
    image = torch.randint(2, (rows,), generator=generator)
    start = torch.tensor([0, *torch.tensor([h * w for h, w in sizes]).cumsum(0).tolist()])
    width = torch.tensor([w for _, w in sizes])

    def run(read: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        out = read()
        return (out.detach(), *torch.autograd.grad(out.sum(), maps))

    def ours() -> tuple[Tensor, ...]:
        return run(lambda: gather_at(maps, image, Provenance(level, y, x, level)))

    def peer() -> tuple[Tensor, ...]:
        flat = lambda: torch.cat([m.permute(0, 2, 3, 1).reshape(2, -1, 256) for m in maps], dim=1)  # noqa: E731
        return run(lambda: flat()[image, start[level] + y * width[level] + x])

    def equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> str:
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
        return "values and gradients equal bit for bit"

    return bench.compare(
        "gather", ours, peer, equal, shape="1024 rows of 5 maps, 2 images 800x1344, 256 channels", required=">= 3"
    )


def operators() -> list[bench.Comparison]:
    """mmcv's functions over the fallback, against mmcv's own paths without compiled operators."""
    maps = torch.randn(2, 256, 100, 168)
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand((512, 2), generator=generator) * torch.tensor([1200.0, 700.0])
    boxes = torch.cat([corner, corner + 20 + 100 * torch.rand((512, 2), generator=generator)], dim=1)
    rois = torch.cat([torch.randint(2, (512, 1), generator=generator).float(), boxes], dim=1)
    own, theirs = RoIAlign(7, 0.125), RoIAlign(7, 0.125, use_torchvision=True)
    scores = torch.rand(512, generator=generator)

    def loop() -> Tensor:
        order, kept = scores.argsort(descending=True), []
        while len(order):
            best, order = order[0], order[1:]
            kept.append(best)
            order = order[torchvision.ops.box_iou(boxes[best][None], boxes[order])[0] <= 0.5]
        return torch.stack(kept)

    def same(a: Tensor, b: Tensor) -> str:
        assert torch.equal(a, b)
        return "equal bit for bit"

    with torch.no_grad():
        return [
            bench.compare(
                "roi_align_fallback",
                lambda: own(maps, rois),
                lambda: theirs(maps, rois),
                same,
                shape="512 RoIs, 256 x 100 x 168; peer: mmcv use_torchvision",
                required=">= 0.9",
                pairs=21,
            ),
            bench.compare(
                "nms_fallback",
                lambda: nms(boxes, scores, 0.5)[1],
                loop,
                same,
                shape="512 boxes; peer: greedy loop in torch",
                required=">= 1",
                pairs=21,
            ),
        ]


def batch_of(model: Any, count: int, side: int = 128) -> tuple[Tensor, list[Any]]:
    """Drawn images of 128 pixels, enlarged to ``side``, preprocessed."""
    inputs, samples = [], []
    for i in range(count):
        image, objects = rendered.draw(i)
        factor = side // 128
        image = image.repeat(factor, axis=0).repeat(factor, axis=1)
        inputs.append(torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1))
        sample = DetDataSample(
            metainfo={"img_id": i, "img_shape": (side, side), "ori_shape": (side, side), "scale_factor": (1.0, 1.0)}
        )
        boxes = factor * torch.tensor([b for _, b in objects]).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=torch.tensor([c for c, _ in objects], dtype=torch.int64)
        )
        samples.append(sample)
    data = model.data_preprocessor({"inputs": inputs, "data_samples": samples}, True)
    return data["inputs"], data["data_samples"]


def flops() -> list[bench.Comparison]:
    """FLOPs of a training step of the paper's pair against the sum of its parts, on one image of 512 x 512 pixels.

    The adapters are no part of the sum. They cost the same at every size, so on images this small they weigh twice what
    they do on the paper's.
    """
    student_model, teacher_config = (
        resolve_config(f"mmdet::{name}")
        for name in ("retinanet/retinanet_r18_fpn_1x_coco.py", "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py")
    )
    student_model = {**student_model.model.to_dict(), "backbone": {**student_model.model.backbone, "init_cfg": None}}
    student_model["data_preprocessor"] = {**student_model["data_preprocessor"]}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.pth"
        torch.manual_seed(0)
        torch.save({"state_dict": MODELS.build(copy.deepcopy(teacher_config.model)).state_dict()}, file)
        teacher = {"config": copy.deepcopy(teacher_config), "checkpoint": str(file)}
        labels_only = {
            "head": teacher_config.model.roi_head.to_dict(),
            "train_cfg": teacher_config.model.train_cfg.rcnn.to_dict(),
            "akd_weight": 0,
            "ckd_weight": 0,
            "transfer": False,
        }
        common: dict[str, Any] = {"schedule": {"warmup": 0}}
        assisted = HEADDetector(student_model, assistants=[labels_only], **common)
        images, samples = batch_of(assisted, 1, 512)
        view = TeacherView.load(copy.deepcopy(teacher_config), file)
        cache = Path(folder) / "c"
        batch = [(images, copy.deepcopy(samples))]
        write_cache(cache, view, batch, 1, names=["fc1", "fc2"], data="d", boxes_per_image=512)
        own = [{"normalize": True}]
        full = HEADDetector(student_model, assistants=own, teacher=teacher, **common)
        cached = HEADDetector(student_model, assistants=own, teacher={**teacher, "cache": str(cache)}, **common)
        assist, all_terms, from_cache = (
            training_flops(m, images, copy.deepcopy(samples)) for m in (assisted, full, cached)
        )
        from torch.utils.flop_counter import FlopCounterMode

        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            view.at_rois(view.features(images, samples), torch.zeros(512, 5), ["fc2"])
        parts = assist + counter.get_total_flops()

    def counted(id: str, ours: float, peer: float, shape: str) -> bench.Comparison:
        same = "counts of the same image, 512 regions"
        return bench.counted(id, ours / 1e9, peer / 1e9, shape=shape, unit="GFLOP", required=">= 0.97", equal=same)

    pair = "RetinaNet R18, Faster R-CNN R50, 512x512"
    return [
        counted("step_flops", all_terms, parts, f"{pair}: HEAD step / student + assistant + teacher's part"),
        counted("step_flops_cached", from_cache, assist, f"{pair}: step with TargetCache / student + assistant"),
    ]


def exported() -> bench.Comparison:
    """The student that HEAD trained against the plain one."""
    full = HEADDetector(small.retinanet(), seed=0).eval()
    images, _ = batch_of(full, 8)
    plain = MODELS.build(ConfigDict(small.retinanet())).eval()
    plain.load_state_dict({k: full.state_dict()[k] for k in plain.state_dict()})

    def equal(a: Any, b: Any) -> str:
        for x, y in zip(a, b, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
        return "outputs equal bit for bit"

    with torch.no_grad():
        return bench.compare(
            "student_time",
            lambda: full(images, mode="tensor"),
            lambda: plain(images, mode="tensor"),
            equal,
            shape="8 images 128x128; ours: after HEAD, peer: plain mmdet",
            required=">= 0.95",
            pairs=41,
            warm_up=3,
        )


def measure() -> list[bench.Comparison]:
    """All rows."""
    stack.start()
    return [proposals(8, 128, 6), proposals(4, 512, 80), gathering(), *operators(), *flops(), exported()]


if __name__ == "__main__":
    sys.exit(
        bench.main(
            "head-kd",
            {"mmdet": mmdet.__version__, "mmcv": mmcv.__version__, "torchvision": torchvision.__version__},
            measure,
        )
    )
