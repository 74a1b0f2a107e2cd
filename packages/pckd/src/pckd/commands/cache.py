"""`pckd cache`: the teacher's outputs on disk."""

import sys

import torch

from pckd.cache import TeacherCache
from pckd.config import CacheSettings
from pckd.data import load
from pckd.tap import ClassifierTap
from pckd.training import cache_card, load_teacher, teaching
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.terminal import track


def run(settings: CacheSettings, invocation: Invocation) -> None:
    """Run the teacher over all training images, once for each epoch of augmentation."""
    folder = invocation.folder
    device = choose_device(settings.device)
    data = load(settings.data, settings.reading)
    if data.train.images is None:
        raise UserError(
            "a cache needs images that are kept in memory: raise --reading.resident_gb or lower --reading.size"
        )
    teacher = load_teacher(settings.teacher, settings.teacher_weights, data)
    teacher.model.to(device)
    head = ClassifierTap(teacher.plain, settings.teacher_tap).classifier
    batches = [
        (epoch, index)
        for epoch in range(settings.epochs)
        for index in torch.split(torch.arange(len(data.train)), settings.batch_size)
    ]
    shape = (settings.epochs, len(data.train), settings.views.count)
    TeacherCache.write(
        folder,
        {**cache_card(data, settings.views, settings.seed, teacher.hash), "epochs": settings.epochs},
        teaching(teacher, settings, data),
        track(batches, "teacher", quiet=invocation.quiet),
        head,
        shape,
    )
    size = sum(path.stat().st_size for path in folder.path.glob("*.npy")) / 1e6
    sys.stdout.write(
        f"{shape[0]} epochs of {shape[1]} images in {shape[2]} views, {size:.0f} MB in {folder.path};"
        " next: pckd train --cache with the same --data, --seed, --views and --reading\n"
    )
