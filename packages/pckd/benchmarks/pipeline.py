"""What a step costs besides student and teacher: the views against PIL's pipeline, a whole run with a cached teacher, FLOPs.

Views: a batch of 64 CIFAR images in four views, from uint8 to normalized tensors. The peer is the pipeline of the data set
that the authors use, with torchvision's transforms on PIL images in one process (of which a loader runs several at once).
Both make the same views: pixels are compared for the draws of one batch.

Cached run: resnet8x4 from resnet32x4 on 32 random images, one step an epoch, for eight epochs, with the teacher's outputs
kept for one epoch (k = 1; its making is in the time). The accuracy of neither means anything here; the same steps are
taken.

FLOPs: of one step at the CIFAR setting (64 images, four views, resnet32x4 -> resnet8x4), counted by torch, all but the
forward and backward pass of the student and the forward pass of the teacher. The row gives the share.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from pckd import Distiller, MultiView, TeacherCache, Views
from pckd.config import CacheSettings, TrainSettings
from pckd.models import build
from pckd.teacher import Teacher, as_teacher
from pckd.training import cache_card, teaching, train_student
from pckd.views import normalize
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional

from tenfold import bench
from tenfold.images import ImageData, Split
from tenfold.runs import Run

MEAN, STD = (0.5071, 0.4866, 0.4409), (0.2675, 0.2565, 0.2761)
STUDENT, TEACHER = "cifar:resnet8x4", "cifar:resnet32x4"


def pixels(count: int) -> Tensor:
    """Random images, channels last."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return images.permute(0, 3, 1, 2)


def pil_pipeline(images: list[np.ndarray], mirrored: list[bool], corners: list[list[list[int]]]) -> Tensor:
    """Mirror once; turn, pad, crop, to tensor and normalize each view."""
    out = []
    for image, mirror, crops in zip(images, mirrored, corners, strict=True):
        picture = Image.fromarray(image)
        if mirror:
            picture = functional.hflip(picture)
        for k, (row, column) in enumerate(crops):
            view = functional.crop(functional.pad(functional.rotate(picture, 90 * k), 4), row, column, 32, 32)
            out.append(functional.normalize(functional.to_tensor(view), MEAN, STD))
    return torch.stack(out)


def view_row() -> bench.Comparison:
    """Views of one batch."""
    images, index = pixels(64), torch.arange(64)
    multi = MultiView(Views())
    mirrored, corners = multi.parameters(index, 0)
    arrays = [image.permute(1, 2, 0).contiguous().numpy() for image in images]
    flags, places = mirrored.tolist(), corners.tolist()

    def equal(a: Tensor, b: Tensor) -> str:
        worst = float((a - b).abs().max())
        assert worst < 1e-5, worst
        return f"largest difference {worst:.1g}"

    return bench.compare(
        "views, PIL pipeline",
        lambda: normalize(multi(images, index, 0), MEAN, STD),
        lambda: pil_pipeline(arrays, flags, places),
        equal,
        shape="64 images in 4 views of 32 x 32",
        required=">= 10",
        pairs=21,
        warm_up=3,
    )


def data() -> ImageData:
    """Random images of a hundred classes."""
    labels = torch.arange(32)
    train = Split(labels, pixels(32), (), 32)
    return ImageData(train, None, train.part(range(8)), tuple(map(str, range(100))), MEAN, STD, "random pixels")


def cached_row() -> bench.Comparison:
    """A whole short run."""
    own = data()
    torch.manual_seed(0)
    teacher: Teacher = as_teacher(build(TEACHER, 100), own)
    settings = TrainSettings(
        data="npz:none",
        student=STUDENT,
        teacher=TEACHER,
        teacher_weights="none",
        epochs=8,
        batch_size=32,
        checkpoint_every=10**6,
        device="cpu",
    )

    def live() -> int:
        return len(train_student(own, settings, teacher=teacher, quiet=True).history)

    def cached() -> int:
        with tempfile.TemporaryDirectory() as folder:
            making = CacheSettings(data="npz:none", teacher=TEACHER, teacher_weights="none", epochs=1)
            run = Run.open(Path(folder) / "cache", package="pckd", verb="cache", settings=making)
            card = {**cache_card(own, making.views, 0, teacher), "epochs": 1}
            batches = [(0, index) for index in torch.split(torch.arange(32), 32)]
            teach = teaching(teacher, making, own)
            TeacherCache.write(run, card, teach, batches, teacher.tap().centers, (1, 32, 4))
            cache = TeacherCache(run.path)
            return len(train_student(own, settings, cache=cache, quiet=True).history)

    def equal(a: int, b: int) -> str:
        assert a == b
        return f"{a} epochs of the same steps; the cache rounds to half precision"

    return bench.compare(
        "whole run, live teacher",
        cached,
        live,
        equal,
        shape="8 epochs of one step of 32 images in 4 views, k = 1",
        required=">= 2",
        pairs=3,
        warm_up=0,
    )


def flops_row() -> bench.Comparison:
    """Operations of one step."""
    torch.manual_seed(0)
    student, teacher = build(STUDENT, 100), build(TEACHER, 100)
    images = torch.randn(256, 3, 32, 32)
    distiller = Distiller(student, teacher, example=images[:2])
    with FlopCounterMode(display=False) as whole:
        distiller(images, torch.arange(64), 1).total.backward()
    with FlopCounterMode(display=False) as models:
        student(images).sum().backward()
        with torch.no_grad():
            teacher(images)
    rest = whole.get_total_flops() - models.get_total_flops()
    total = models.get_total_flops()
    return bench.counted(
        "operations beside student and teacher, share of theirs",
        rest / 1e9,
        total / 1e9,
        shape="64 images in 4 views, resnet32x4 -> resnet8x4",
        unit="GFLOP",
        required="<= 0.05",
        equal="ratio is the share here, ours / student and teacher",
        statistic="counted by torch.utils.flop_counter (matrix products and convolutions)",
        ratio=rest / total,
    )


def measure() -> list[bench.Comparison]:
    """All rows."""
    return [view_row(), flops_row(), cached_row()]


if __name__ == "__main__":
    raise SystemExit(bench.main("pckd", {"torchvision and PIL": "as installed"}, measure))
