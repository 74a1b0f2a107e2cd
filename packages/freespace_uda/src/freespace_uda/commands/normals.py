"""`freespace-uda normals`: normals of a data set, computed once."""

import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from freespace_uda.commands._files import look, read
from freespace_uda.config import NormalsSettings
from freespace_uda.items import normals_of
from freespace_uda.normal_cache import INDEX, NUMBERS, write
from freespace_uda.normals import resize_normals
from freespace_uda.scenes import Scenes
from tenfold.cli import Invocation
from tenfold.terminal import track


def run(settings: NormalsSettings, invocation: Invocation) -> None:
    """Write ``normals.bin`` and, last, its index ``normals.json``."""
    scenes = read(settings.data, settings.reading, usual="train")
    look(scenes, f"--data {settings.data}", labels=False)
    folder = invocation.folder
    with folder.replacing(NUMBERS) as path, path.open("wb") as file:
        places = write(file, _all(scenes, settings, invocation.quiet), settings.encoding)
    head: dict[str, Any] = {"source": scenes.source, "method": settings.normals.method, "encoding": settings.encoding}
    folder.write_text(INDEX, json.dumps({**head, "places": places}))
    size = (folder.path / NUMBERS).stat().st_size
    sys.stdout.write(
        f"normals of {len(places)} scenes in {folder.path}, {size / 2**20:.1f} MiB; train takes them "
        f"with --normal_cache\n"
    )


def _all(scenes: Scenes, settings: NormalsSettings, quiet: bool) -> Iterator[tuple[str, Any, Any]]:
    for i in track(range(len(scenes)), "normals", len(scenes), quiet=quiet):
        item = scenes.item(i)
        size = item.size if settings.size is None else (settings.size[1], settings.size[0])
        if item.depth is None:
            yield scenes.name(i), np.zeros((3, *size), np.float32), np.zeros((1, *size), np.float32)
            continue
        normals, valid = resize_normals(*normals_of(item.depth, item.intrinsics, settings.normals), size)
        yield scenes.name(i), normals[0].numpy(), valid[0].numpy()
