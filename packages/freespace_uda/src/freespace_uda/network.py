"""Two encoders, cross guidance between them, one decoder, and three heads: RGB, normals, and both."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freespace_uda.encoders import Encoder, Norm, norm_layer
from freespace_uda.guidance import CrossGuidance, GuidanceMode, pooled_validity
from tenfold import UserError

Streams = Literal["both", "rgb", "normals"]
Fusion = Literal["concat", "sum"]
ALIGNED_STRIDE = 8
"""Stride of the maps that are aligned and that the heads of single modalities read."""


class Outputs(NamedTuple):
    """What the network gives for a batch; logits of road at the size of the input.

    Attributes:
        fused: (B, 1, H, W).
        rgb: logits of the RGB head; None where the network has no such stream.
        normal: logits of the normal head; likewise.
        features: guided maps at stride 8 by stream (``rgb``, ``normal``), each (B, C, H/8, W/8).
        attention: by stream, where the tokens of the coarsest guidance were read; empty without tokens.
        coarse: the logits of the heads at their own size, by name (``fused``, ``rgb``, ``normal``).
    """

    fused: Tensor
    rgb: Tensor | None
    normal: Tensor | None
    features: dict[str, Tensor]
    attention: dict[str, Tensor]
    coarse: dict[str, Tensor]


def _upsampled(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


class FreespaceNet(nn.Module):
    """Road or not, from RGB and surface normals, each of which may be missing.

    Two encoders of their own weights; ``CrossGuidance`` at every stride from 8 on; a 1 x 1 convolution of both streams'
    maps to ``width`` channels per stride, summed from coarse to fine, one 3 x 3 convolution, one logit. Heads of the
    single modalities read the guided maps at stride 8. A logit is log p / (1 - p), which is the same as two classes.

    Args:
        rgb_encoder: name of the encoder of RGB, see ``Encoder``.
        normal_encoder: name of the encoder of normals and validity.
        streams: both, or one modality alone.
        guidance: tokens, channel or none.
        tokens: tokens of each stream.
        fusion: concat, or sum (maps are added, as RoadSeg does; the encoders then need equal channels).
        width: channels of the decoder.
        norm: group, frozen or batch, see ``Encoder``.
        pretrained: ask timm for its weights of RGB.
        size: height and width that the encoders are tried with.

    Raises:
        UserError: see ``Encoder``; no common map at stride 8; ``sum`` with encoders of different channels.

    Source: the abstract of "Cross-Modality Domain Adaptation for Freespace Detection", ACM MM 2022; backbone and decoder are
    our choice.

    Example:
        >>> net = FreespaceNet("freespace:tiny", width=8).eval()
        >>> road = net.probability(torch.rand(1, 3, 64, 128), None, None)  # depth is missing
        >>> road.shape
        torch.Size([1, 1, 64, 128])
    """

    def __init__(
        self,
        rgb_encoder: str = "freespace:small",
        normal_encoder: str | None = None,
        *,
        streams: Streams = "both",
        guidance: GuidanceMode = "tokens",
        tokens: int = 2,
        fusion: Fusion = "concat",
        width: int = 48,
        norm: Norm = "group",
        pretrained: bool = False,
        size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.streams = streams
        encoders = {}
        if streams != "normals":
            encoders["rgb"] = Encoder(rgb_encoder, pretrained=pretrained, norm=norm, size=size)
        if streams != "rgb":
            encoders["normal"] = Encoder(
                normal_encoder or rgb_encoder,
                pretrained=pretrained and normal_encoder is None,
                in_chans=4,
                norm=norm,
                size=size,
                option="--normal_encoder",
            )
        self.encoders = nn.ModuleDict(encoders)
        self.reductions = tuple(
            r for r in (4, 8, 16, 32) if all(r in encoder.reductions for encoder in encoders.values())
        )
        if ALIGNED_STRIDE not in self.reductions:
            raise UserError(f"--rgb_encoder {rgb_encoder}: a map at stride {ALIGNED_STRIDE} is needed in every encoder")
        for encoder in encoders.values():
            encoder.limit(self.reductions)
        self.aligned = self.reductions.index(ALIGNED_STRIDE)
        self.feature_channels = {name: e.channels[self.aligned] for name, e in encoders.items()}
        both = streams == "both"
        of_stage = list(zip(*(e.channels for e in encoders.values()), strict=True))
        if fusion == "sum" and any(len(set(c)) > 1 for c in of_stage):
            raise UserError(f"--fusion sum: the encoders have different channels {of_stage}")
        self.fusion = fusion
        self.guides = nn.ModuleList(
            CrossGuidance((c[0], c[1]), tokens, guidance if both and r >= ALIGNED_STRIDE else "none")
            for c, r in zip(of_stage, self.reductions, strict=True)
            if both
        )
        make = norm_layer("batch" if norm == "batch" else "group")
        self.laterals = nn.ModuleList(nn.Conv2d(c[0] if fusion == "sum" else sum(c), width, 1) for c in of_stage)
        self.smooth = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), make(width), nn.ReLU(inplace=True), nn.Conv2d(width, 1, 1)
        )
        self.heads = nn.ModuleDict({name: nn.Conv2d(c, 1, 1) for name, c in self.feature_channels.items()})

    def forward(self, rgb: Tensor | None, normals: Tensor | None, valid: Tensor | None) -> Outputs:
        """Logits and maps; a modality that is None counts as absent from the whole batch.

        Args:
            rgb: pixels in [0, 1], (B, 3, H, W).
            normals: unit vectors, 0 where unknown, (B, 3, H, W).
            valid: validity of the normals, (B, 1, H, W).

        Raises:
            ValueError: nothing that the network could look at.
        """
        if (rgb is None or self.streams == "normals") and (normals is None or self.streams == "rgb"):
            raise ValueError("both RGB and depth are missing: there is nothing to look at")
        given = rgb if rgb is not None else normals
        assert given is not None
        size = given.shape[-2:]
        maps: dict[str, list[Tensor]] = {}
        if self.streams != "normals":
            pixels = given.new_full((given.shape[0], 3, *size), 0.5) if rgb is None else rgb
            maps["rgb"] = self.encoders["rgb"](pixels)
        if self.streams != "rgb":
            if normals is None or valid is None:
                normals, valid = given.new_zeros(given.shape[0], 3, *size), given.new_zeros(given.shape[0], 1, *size)
            maps["normal"] = self.encoders["normal"](torch.cat([normals, valid], 1))
        attention: dict[str, Tensor] = {}
        if len(maps) == 2:
            assert valid is not None
            for stage, guide in enumerate(self.guides):
                r, n = maps["rgb"][stage], maps["normal"][stage]
                guided = guide(r, n, pooled_validity(valid, (r.shape[-2], r.shape[-1])))
                maps["rgb"][stage], maps["normal"][stage] = guided.rgb, guided.normal
                if guided.rgb_attention is not None:
                    attention = {"rgb": guided.rgb_attention, "normal": guided.normal_attention}
        features = {name: found[self.aligned] for name, found in maps.items()}
        coarse = {name: head(features[name]) for name, head in self.heads.items()}
        coarse["fused"] = self._decode(list(maps.values()))
        full = {name: _upsampled(logits, (size[0], size[1])) for name, logits in coarse.items()}
        return Outputs(full["fused"], full.get("rgb"), full.get("normal"), features, attention, coarse)

    def _decode(self, maps: list[list[Tensor]]) -> Tensor:
        x: Tensor | None = None
        for stage in reversed(range(len(self.reductions))):
            here = [found[stage] for found in maps]
            joined = here[0] if len(here) == 1 else torch.cat(here, 1) if self.fusion == "concat" else here[0] + here[1]
            lateral = self.laterals[stage](joined)
            x = lateral if x is None else lateral + _upsampled(x, (lateral.shape[-2], lateral.shape[-1]))
        assert x is not None
        found: Tensor = self.smooth(x)
        return found

    def probability(self, rgb: Tensor | None, normals: Tensor | None, valid: Tensor | None) -> Tensor:
        """Probability of road, (B, 1, H, W).

        Samples without any valid depth are answered by the RGB head; without RGB the normal head answers, and is 0.5 where
        there is no depth at all.
        """
        out = self(rgb, normals, valid)
        fused = out.fused.sigmoid()
        if self.streams != "both":
            return fused
        assert out.rgb is not None
        assert out.normal is not None
        if rgb is None:
            return out.normal.sigmoid()
        if valid is None:
            return out.rgb.sigmoid()
        some = (valid > 0).flatten(1).any(1).view(-1, 1, 1, 1)
        return torch.where(some, fused, out.rgb.sigmoid())
