"""`genview fit-foreground`: what is foreground, from a sample of the pictures."""

import sys
from collections.abc import Iterator

import torch

from genview.commands import _files, _pictures
from genview.config import FitForegroundSettings
from genview.data import load
from genview.encoders import build_encoder
from genview.foreground import ForegroundModel
from genview.training import FOREGROUND
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.randomness import generator
from tenfold.report import write_report
from tenfold.terminal import track


def run(settings: FitForegroundSettings, invocation: Invocation) -> None:
    """Fit, write the model, draw masks to look at."""
    folder, device = invocation.folder, choose_device(settings.device)
    data = load(settings.data)
    encoder = build_encoder(settings.encoder, weights=settings.encoder_weights, device=device)
    order = torch.randperm(len(data.train), generator=generator(settings.seed, 0))[: settings.images].sort().values
    bad: dict[int, str] = {}

    def batches() -> Iterator[torch.Tensor]:
        parts = [
            order[start : start + settings.batch_size].tolist() for start in range(0, len(order), settings.batch_size)
        ]
        for part in track(parts, "tokens", quiet=invocation.quiet):
            images, good, faults = _files.prepared(encoder, data.train, part)
            bad.update(faults)
            if good:
                seen = encoder(images)
                grids.add(seen.grid)
                yield seen.tokens.cpu()

    grids: set[tuple[int, int]] = set()
    first = next(batches(), None)
    if first is None:
        raise UserError(
            f"--data {settings.data}: none of {len(order)} pictures can be decoded: {next(iter(bad.values()))}"
        )
    model = ForegroundModel.fit(
        batches,
        encoder=encoder.name,
        quantile=settings.quantile,
        sign=settings.sign,
        grid=next(iter(grids)),
        component=settings.component,
    )
    model.save(folder.own(FOREGROUND))
    about = {
        "spec": settings.encoder,
        "weights": settings.encoder_weights,
        "encoder": encoder.name,
        "images": model.images,
        "broken": len(bad),
        "grid": list(model.grid),
        "threshold": model.threshold,
        "margin": model.margin,
        "sign": model.sign,
    }
    folder.write_json(_files.SUMMARY, about)
    _pictures.masks(folder, data.train, model, encoder, order[:16].tolist())
    captions = {"masks": "Pictures of the sample; what counts as foreground keeps its colors. Is it the object?"}
    write_report(folder, f"genview fit-foreground: {settings.encoder}", captions)
    sys.stdout.write(
        f"foreground by {encoder.name} from {model.images} pictures ({len(bad)} broken), margin of the side"
        f" {model.margin:.2f} standard deviations; look at {folder.path / 'figures/masks.png'}\n"
    )
