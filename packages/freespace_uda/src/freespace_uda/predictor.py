"""A trained network as a user calls it: a picture, its depth, its camera -> where the road is, at the picture's own size."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from freespace_uda.config import NetSettings
from freespace_uda.items import to_network
from freespace_uda.models import load_model
from freespace_uda.network import FreespaceNet
from freespace_uda.normals import SurfaceNormals
from freespace_uda.scenes import Item
from tenfold import UserError
from tenfold.modules import evaluating


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What was found in one picture, at its own size.

    Attributes:
        probability: of road, (H, W).
        confidence: how sure either answer is, |2 p - 1|, (H, W).
        normals: (3, H, W), 0 where there is no depth; None without depth.
    """

    probability: NDArray[np.float32]
    confidence: NDArray[np.float32]
    normals: NDArray[np.float32] | None

    def mask(self, threshold: float = 0.5) -> NDArray[np.bool_]:
        """Where the probability reaches the threshold."""
        found: NDArray[np.bool_] = self.probability >= threshold
        return found


class Predictor:
    """Calls a network on pictures of any size.

    Args:
        net: the network.
        settings: its settings.
        device: where to compute.
    """

    def __init__(self, net: FreespaceNet, settings: NetSettings, device: str = "cpu") -> None:
        self.net, self.settings, self.device = net.to(device).eval(), settings, device

    @classmethod
    def from_run(cls, path: str | Path, device: str = "cpu") -> "Predictor":
        """The network of a folder of `freespace-uda train`.

        Raises:
            UserError: no such file, or not one of ours.
        """
        net, settings, _ = load_model(path)
        return cls(net, settings, device)

    def __call__(
        self,
        rgb: NDArray[np.uint8] | None,
        depth: NDArray[np.float32] | None = None,
        intrinsics: NDArray[Any] | None = None,
    ) -> Prediction:
        """Where the road is.

        Args:
            rgb: (H, W, 3) uint8; None without a picture.
            depth: (H, W) in meters along z, 0 or NaN where unknown; None without depth.
            intrinsics: K, (3, 3), of this picture size; needed with depth.

        Raises:
            UserError: neither picture nor depth, or depth without intrinsics, or another size.
        """
        if rgb is None and depth is None:
            raise UserError("neither a picture nor depth: there is nothing to look at")
        if depth is not None and intrinsics is None:
            raise UserError("depth needs the camera's intrinsics, (3, 3)")
        if rgb is not None and depth is not None and rgb.shape[:2] != depth.shape[:2]:
            raise UserError(f"picture {rgb.shape[:2]} and depth {depth.shape[:2]} differ in size")
        return self.items([Item(rgb, depth, np.eye(3) if intrinsics is None else np.asarray(intrinsics))])[0]

    def items(self, items: list[Item]) -> list[Prediction]:
        """Predictions of several scenes, computed together; each must have what the network's streams need.

        Raises:
            UserError: a scene lacks the only modality that the network has.
        """
        streams = self.settings.streams
        for item in items:
            if (streams == "rgb" and item.rgb is None) or (streams == "normals" and item.depth is None):
                raise UserError(f"this model looks at {streams} alone, which a scene does not have")
        parts = [to_network(item, self.settings) for item in items]
        rgb, normals, valid = (torch.stack(column).to(self.device) for column in zip(*parts, strict=True))
        found = torch.empty(len(items), 1, *rgb.shape[-2:])
        seen = torch.tensor([item.rgb is not None for item in items])
        with evaluating(self.net):
            for chosen, pixels in ((seen, rgb), (~seen, None)):
                if bool(chosen.any()):
                    there = chosen.to(self.device)
                    given = None if pixels is None else pixels[there]
                    found[chosen] = self.net.probability(given, normals[there], valid[there]).float().cpu()
        return [
            self._native(p, item, n, v) for p, item, n, v in zip(found, items, normals.cpu(), valid.cpu(), strict=True)
        ]

    def _native(self, probability: Tensor, item: Item, normals: Tensor, valid: Tensor) -> Prediction:
        size = item.size
        if probability.shape[-2:] != size:
            probability = F.interpolate(probability[None], size, mode="bilinear", align_corners=False)[0]
        p = probability[0].numpy()
        shown = None
        if item.depth is not None:
            shown = F.interpolate(normals[None], size, mode="nearest")[0].numpy()
        return Prediction(p, np.abs(2 * p - 1), shown)


class Exported(nn.Module):
    """(rgb, depth, K) -> probability of road, with the normals inside, for pictures of the network's size.

    Args:
        net: the network.
        settings: its settings.
    """

    def __init__(self, net: FreespaceNet, settings: NetSettings) -> None:
        super().__init__()
        n = settings.normals
        self.net = net
        self.surface = SurfaceNormals(n.method, "camera", n.edges, n.fill)

    def forward(self, rgb: Tensor, depth: Tensor, intrinsics: Tensor) -> Tensor:
        """Probability (B, 1, H, W).

        Args:
            rgb: pixels in [0, 1], (B, 3, H, W).
            depth: meters along z, (B, 1, H, W); 0, NaN and infinite values are holes.
            intrinsics: (B, 3, 3).
        """
        normals, valid = self.surface(depth, intrinsics)
        return self.net.probability(rgb, normals, valid)
