"""A tiny pipeline with random weights, and the folders that the commands make of it."""

import numpy as np
import pytest
import torch
from genview import tiny
from genview.cli import main

SIZE = tiny.TinySize(image=16, embedding=8, width=16, channels=(16,))


@pytest.fixture(scope="session")
def generator(tmp_path_factory):
    """Folder of a pipeline of the real class."""
    pipe = tiny.build_tiny_unclip(SIZE, seed=1)
    with torch.no_grad():
        pipe.image_normalizer.std.fill_(0.5)
    folder = tmp_path_factory.mktemp("generator") / "tiny"
    tiny.save(pipe, folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """24 training and 16 test pictures of 4 classes that differ in the color of a square in their middle."""
    rng = np.random.default_rng(0)
    parts = {}
    for name, n in (("train", 24), ("test", 16)):
        labels = np.arange(n) % 4
        images = rng.integers(0, 90, (n, 16, 16, 3))
        colors = np.asarray([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]])
        images[:, 4:12, 4:12] = (
            colors[labels][:, None, None] - rng.integers(0, 40, (n, 8, 8, 3)) * (colors[labels] > 0)[:, None, None]
        )
        parts |= {f"{name}_images": images.astype(np.uint8), f"{name}_labels": labels}
    path = tmp_path_factory.mktemp("data") / "colors.npz"
    np.savez(path, **parts)
    return path


@pytest.fixture(scope="session")
def world(tmp_path_factory, generator, data):
    """Folders of a whole way: foreground, plan, views, merged."""
    root = tmp_path_factory.mktemp("world")
    run = lambda *words: main([*map(str, words), "--quiet"])  # noqa: E731
    assert (
        run("fit-foreground", "--data", f"npz:{data}", "--encoder", f"generator:{generator}", "--out", root / "fg") == 0
    )
    shared = ("--foreground", root / "fg", "--generator", generator, "--unit", 5)
    assert run("plan", "--data", f"npz:{data}", *shared, "--out", root / "plan") == 0
    generate = ("generate", "--plan", root / "plan", "--generator", generator, "--steps", 2)
    assert run(*generate, "--views", root / "views", "--out", root / "log") == 0
    score = ("--quality_encoder", f"generator:{generator}", "--quality_foreground", root / "fg")
    assert run("merge", "--plan", root / "plan", "--views", root / "views", *score, "--out", root / "merged") == 0
    return root
