"""`genview plan`: the noise level of every view, decided before anything is generated."""

import math
import sys
from collections.abc import Callable

import torch

from genview import plans
from genview.captions import guidance_of
from genview.commands import _files
from genview.config import PlanSettings
from genview.data import Pictures, load
from genview.generators import UnCLIPGenerator, ViewGenerator, load_generator
from genview.levels import AdaptivePolicy, ConstantPolicy, NoisePolicy, RandomPolicy
from genview.plans import PlanRow
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.terminal import table, track


def policy_of(settings: PlanSettings) -> NoisePolicy:
    """The policy that the settings describe."""
    if settings.policy == "adaptive":
        return AdaptivePolicy(settings.edges, settings.levels)
    if settings.policy == "constant":
        return ConstantPolicy(settings.levels[0])
    return RandomPolicy(settings.levels, settings.seed)


def run(settings: PlanSettings, invocation: Invocation) -> None:
    """Measure foregrounds, embed, and write the rows."""
    folder, device = invocation.folder, choose_device(settings.device)
    data = load(settings.data)
    pictures = data.train
    if settings.prompts == "captions" and not any(pictures.captions):
        raise UserError(
            f"--prompts captions: {settings.data} has none; csv: with a column prompt, or webdataset: with .txt"
        )
    generator = None
    if settings.generator is not None:
        generator = load_generator(settings.kind, settings.generator, adapter=settings.adapter, device=device)
    ratios, embeddings, errors = measured(settings, pictures, generator, device, quiet=invocation.quiet)
    policy = policy_of(settings)
    rows: list[PlanRow] = []
    for i, key in enumerate(pictures.keys):
        level = pictures.levels[i] if pictures.levels else -1
        asked = pictures.guidance[i] if pictures.guidance else math.nan
        prompt = pictures.captions[i] if settings.prompts == "captions" else ""
        scale = settings.guidance if math.isnan(asked) else asked
        if settings.prompts == "captions" and math.isnan(asked):
            scale = guidance_of(prompt)
        for variation in range(settings.variations):
            number = len(rows)
            chosen = 0 if i in errors else level if level >= 0 else policy(max(0.0, ratios[i]), number)
            seed = plans.seed_of(settings.seed, key, variation)
            rows.append(
                PlanRow(number, i, key, variation, ratios[i], chosen, scale, prompt, seed, -1, errors.get(i, ""))
            )
    rows = plans.in_units(rows, settings.unit)
    plans.write(folder, rows, embeddings)
    known = [r for i, r in enumerate(ratios) if i not in errors and r >= 0]
    folder.write_json(
        "plan.json",
        {
            "rows": len(rows),
            "errors": sum(bool(row.error) for row in rows),
            "levels": {str(level): count for level, count in plans.spread(rows)},
            "mean_ratio": sum(known) / len(known) if known else None,
            "generator": None if generator is None else generator.id,
        },
    )
    sys.stdout.write(table(["noise level", "views"], [[level, count] for level, count in plans.spread(rows)]) + "\n")
    bad = sum(bool(row.error) for row in rows)
    sys.stdout.write(f"{len(rows)} views planned in {folder.path}, {bad} of pictures that cannot be read\n")


def measured(
    settings: PlanSettings, pictures: Pictures, generator: ViewGenerator | None, device: str, *, quiet: bool
) -> tuple[list[float], torch.Tensor | None, dict[int, str]]:
    """Foreground ratio of every picture (-1 without a model), its embedding where a generator is given, and what is broken.

    Where the foreground model is the generator's own, one pass gives both.
    """
    ratios: list[float] = [-1.0] * len(pictures)
    errors: dict[int, str] = {}
    kept: list[torch.Tensor | None] = [None] * len(pictures)
    embeds = generator is not None and generator.needs == "embedding"
    model = encoder = None
    if settings.foreground is not None:
        model, encoder = _files.foreground_of(settings.foreground, None, None, device, option="--foreground")
    own = isinstance(generator, UnCLIPGenerator) and encoder is not None and encoder.name == generator.encoder.name
    size = encoder.size if encoder is not None else 224
    square: Callable[[int], torch.Tensor] = lambda i: _files.as_tensor(pictures.read(i))[None]  # noqa: E731
    for part in track(list(_files.in_batches(len(pictures), settings.batch_size)), "pictures", quiet=quiet):
        images, good = [], []
        for i in part:
            try:
                images.append(square(i))
                good.append(i)
            except UserError as error:
                errors[i] = str(error)
        if not good:
            continue
        if model is not None and encoder is not None:
            seen = encoder(torch.cat([_files.square_of(x, size) for x in images]))
            for i, ratio in zip(good, model.ratio(seen.tokens.cpu()).tolist(), strict=True):
                ratios[i] = ratio
            if own and embeds:
                for i, vector in zip(good, seen.pooled.cpu(), strict=True):
                    kept[i] = vector
        if embeds and not own:
            assert generator is not None
            for i, x in zip(good, images, strict=True):
                kept[i] = generator.embed(x)[0].cpu()
    if not embeds or len(errors) == len(pictures):
        return ratios, None, errors
    width = next(len(v) for v in kept if v is not None)
    return ratios, torch.stack([torch.zeros(width) if v is None else v for v in kept]), errors
