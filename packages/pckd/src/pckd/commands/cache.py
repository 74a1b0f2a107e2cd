"""`pckd cache`: the teacher's outputs on disk."""

import sys

import torch

from pckd.cache import TeacherCache
from pckd.config import CacheSettings
from pckd.data import load
from pckd.teacher import load_teacher
from pckd.training import cache_card, teaching
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
    teacher = load_teacher(settings, data).to(device)
    teach = teaching(teacher, settings, data)
    batches = [
        (epoch, index)
        for epoch in range(settings.epochs)
        for index in torch.split(torch.arange(len(data.train)), settings.batch_size)
    ]
    shape = (settings.epochs, len(data.train), settings.views.count)
    TeacherCache.write(
        folder,
        {**cache_card(data, settings.views, settings.seed, teacher), "epochs": settings.epochs},
        teach,
        track(batches, "teacher", quiet=invocation.quiet),
        teacher.tap().centers,
        shape,
    )
    size = sum(path.stat().st_size for path in folder.path.glob("*.npy")) / 1e6
    sys.stdout.write(
        f"{shape[0]} epochs of {shape[1]} images in {shape[2]} views, {size:.0f} MB in {folder.path};"
        " next: pckd train --cache with the same --data, --seed, --views and --reading\n"
    )
