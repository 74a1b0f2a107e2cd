"""The demonstration's world: what the external encoder and generator learn, the views, what they are worth."""

import contextlib
import importlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from genview import scenes, tiny
from genview.encoders import CLIP
from genview.generators import UnCLIPGenerator
from genview.probes import standardized, train_heads
from genview.scenes import ATTRIBUTES, FRONT, GROUND, Scenes
from tenfold import UserError
from tenfold.randomness import generator
from tenfold.terminal import track

SIZE = tiny.TinySize(image=scenes.SIZE, embedding=32, width=64, channels=(16, 32), hidden=384)
NAMED = {FRONT: 0.3, GROUND: 0.0}
"""Share of the captions that name the color of the glyph and of the background; everything else is in all."""
GUIDANCE, STEPS = 2.0, 10
"""Guidance scale and denoising steps of the views."""


@dataclass(frozen=True)
class Lengths:
    """How long everything is trained at a level.

    Attributes:
        scenes: external scenes per glyph.
        encoder: steps of the external encoder.
        sketch: steps of the generator's sketch.
        denoiser: steps of the generator's denoiser.
        train: target scenes per training glyph.
        test: target scenes per test glyph.
        glyphs: target training glyphs, from the first one.
        student: steps of a student.
        batch: pictures per step of a student.
    """

    scenes: int
    encoder: int
    sketch: int
    denoiser: int
    train: int
    test: int
    glyphs: int
    student: int
    batch: int = 128


class Captions(nn.Module):
    """Embeddings of attribute captions; a value that is not named has an entry of its own.

    Args:
        dim: size of an embedding.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(values + 1, dim) for values in ATTRIBUTES])
        self.mix = nn.Sequential(nn.ReLU(), nn.Linear(dim, dim))
        self.scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, attributes: Tensor) -> Tensor:
        """Shapes: (N, 8) int64 -> (N, dim)."""
        h = torch.stack([table(attributes[:, i]) for i, table in enumerate(self.tables)]).sum(dim=0)
        return F.normalize(h + self.mix(h), dim=1)


def as_images(pixels: NDArray[np.uint8]) -> Tensor:
    """(N, H, W, 3) -> (N, 3, H, W)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def train_external_encoder(world: Scenes, steps: int, *, quiet: bool, seed: int = 0) -> Any:
    """An image encoder that has learned captions of the external scenes.

    Captions name digit, slant, stroke, size and place of the glyph, its color in some of them and the background's color in
    none, so that the embedding keeps what the glyph looks like and little of its background.
    """
    encoder = tiny.build_encoder(SIZE, seed).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        captions = Captions(SIZE.embedding)
    parameters = [*encoder.parameters(), *captions.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.15)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in CLIP)
    images, attributes = as_images(world.images), torch.from_numpy(world.attributes)
    draw, own = generator(seed, 3), torch.arange(128)
    for _ in track(range(steps), "external encoder", quiet=quiet):
        index = torch.randint(len(images), (128,), generator=draw)
        told = attributes[index].clone()
        for column, share in NAMED.items():
            told[torch.rand(128, generator=draw) >= share, column] = ATTRIBUTES[column]
        z = F.normalize(encoder(pixel_values=(images[index].float() / 255 - mean) / std).image_embeds, dim=1)
        logits = z @ captions(told).T * captions.scale.exp().clamp(max=50)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        optimizer.step()
        schedule.step()
    tiny.unit_spread(encoder, images, mean, std)
    return encoder.eval()


def build_generator(world: Scenes, lengths: Lengths, *, quiet: bool, seed: int = 0) -> Any:
    """The pipeline, trained on the external scenes."""
    encoder = train_external_encoder(world, lengths.encoder, quiet=quiet, seed=seed)
    pipe = tiny.build_tiny_unclip(SIZE, encoder=encoder, seed=seed)
    training = tiny.Training(steps=lengths.denoiser, sketch_steps=lengths.sketch)
    show = partial(track, description="external generator", quiet=quiet)
    tiny.train_denoiser(pipe, as_images(world.images), training, seed=seed, show=show)
    return pipe


def command(words: Sequence[str]) -> None:
    """Run one command line of ours; what it prints is dropped.

    Raises:
        UserError: it was refused; the message is its own.
    """
    faults = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(faults):
        code = importlib.import_module("genview.cli").main([*words, "--quiet"])
    if code:
        raise UserError(f"genview {words[0]}: {faults.getvalue().strip().splitlines()[-1:]}")


def make_views(work: Path, name: str, plan: Sequence[str], run: Callable[[list[list[str]]], object]) -> None:
    """Plan, generate in two shards, merge with scores: the commands of a full-scale run."""
    generator_folder = str(work / "generator")
    data = ["--data", f"npz:{work / 'target.npz'}"]
    fixed = ["--foreground", str(work / "foreground"), "--generator", generator_folder, "--guidance", str(GUIDANCE)]
    folders = {verb: str(work / f"{name}-{verb}") for verb in ("plan", "views", "merged")}
    command(["plan", *data, *fixed, *plan, "--out", folders["plan"], "--unit", "64", "--resume"])
    shared = ["--plan", folders["plan"], "--views", folders["views"]]
    start = ["generate", *shared, "--generator", generator_folder, "--steps", str(STEPS), "--batch_size", "64"]
    shards = [[*start, "--shard", f"{i}/2", "--out", str(work / f"{name}-log-{i}"), "--resume"] for i in (0, 1)]
    run(shards)
    quality = ["--quality_encoder", f"generator:{generator_folder}", "--quality_foreground", str(work / "foreground")]
    command(["merge", *shared, *quality, "--out", folders["merged"], "--resume"])


@dataclass(frozen=True)
class Judge:
    """The external encoder with a linear classifier of digits that has learned from the external scenes' labels."""

    pipe: Any
    center: Tensor
    spread: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, pipe: Any, world: Scenes) -> "Judge":
        """Learn from the external scenes."""
        embeddings = tiny.embed_all(pipe, as_images(world.images))
        x = standardized(embeddings)[0]
        w, b = train_heads(x, torch.from_numpy(world.labels), 10, (1.0,), epochs=20)
        return cls(pipe, embeddings.mean(dim=0), embeddings.std(dim=0).clamp_min(1e-6), w, b)

    def answers(self, images: Tensor) -> Tensor:
        """Digits of uint8 images (N,)."""
        x = (tiny.embed_all(self.pipe, images) - self.center) / self.spread
        return (x @ self.weight[0].T + self.bias[0]).argmax(dim=1)

    def right(self, images: Tensor, labels: Tensor) -> Tensor:
        """Which answers are right (N,)."""
        return self.answers(images) == labels


def ring(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean color of the outer ring of each picture (N, 3)."""
    inside = np.zeros(images.shape[1:3], bool)
    inside[1:-1, 1:-1] = True
    return images[:, ~inside].mean(axis=1).astype(np.float64)


def gates(judge: Judge, target: Scenes, number: int = 300) -> dict[str, float]:
    """What the generator can: agreement of labels at level 0, contrast, how much of a background it copies.

    Agreement is the share of views that the judge gets right, of those whose pictures it gets right, since the judge itself
    is not always right.
    """
    images, labels = target.images[:number], target.labels[:number]
    reader = UnCLIPGenerator(judge.pipe, steps=STEPS)
    conditions = reader.embed(as_images(images).float() / 255)
    views = reader.generate(conditions, 0, list(range(len(images))), guidance=GUIDANCE)
    truth = torch.from_numpy(labels)
    known = judge.right(as_images(images), truth)
    agreed = judge.right(as_images(views), truth)[known].double().mean() if bool(known.any()) else torch.zeros(())
    copied = np.corrcoef(ring(images).ravel(), ring(views).ravel())[0, 1]
    return {
        "agreement at level 0": float(agreed),
        "judge": float(known.double().mean()),
        "contrast": float(views.std() / images.std()),
        "copied background": float(copied),
    }


def check_gates(found: dict[str, float]) -> None:
    """Stop with a sentence where the generator is too poor for anything to be learned from it.

    Raises:
        UserError: a gate is not passed.
    """
    if found["agreement at level 0"] < 0.7:
        raise UserError(
            f"the generator is too poor: {found['agreement at level 0']:.2f} of its views show their picture's digit, expected"
            " 0.70 or more; it needs a longer training or less guidance"
        )
    if not 0.7 <= found["contrast"] <= 1.3:
        raise UserError(
            f"the generator is too poor: contrast {found['contrast']:.2f} of that of pictures, expected 0.7 to 1.3"
        )
    if found["copied background"] >= 0.6:
        raise UserError(
            f"the generator copies backgrounds (correlation {found['copied background']:.2f}, expected less than 0.6):"
            " its views would teach nothing"
        )


def level_study(judge: Judge, target: Scenes, levels: Sequence[int], number: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Level and agreement of the label, at every level, for those of the pictures that the judge gets right."""
    images, labels = target.images[:number], torch.from_numpy(target.labels[:number])
    reader = UnCLIPGenerator(judge.pipe, steps=STEPS)
    conditions = reader.embed(as_images(images).float() / 255)
    known = judge.right(as_images(images), labels)
    shown, agreed = [], []
    for level in levels:
        views = reader.generate(conditions, level, [1000 + i for i in range(len(images))], guidance=GUIDANCE)
        agreed.append(judge.right(as_images(views), labels)[known].numpy().astype(float))
        shown.append(np.full(len(agreed[-1]), level, float))
    return np.concatenate(shown), np.concatenate(agreed)
