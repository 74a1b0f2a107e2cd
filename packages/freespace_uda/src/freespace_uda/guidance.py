"""Cross guidance: the context of one modality guides the other, both ways at once.

Letters: B batch, C channels, H and W rows and columns of the maps, P = H W pixels, J tokens, D width of the attention.
``m`` is the stream that is guided, ``o`` the other one.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freespace_uda.alignment import full_precision

GuidanceMode = Literal["tokens", "channel", "none"]


class Guided(NamedTuple):
    """Maps of both streams after guidance, and where the tokens of each were read.

    Attributes:
        rgb: (B, C_r, H, W).
        normal: (B, C_n, H, W).
        rgb_attention: (B, J, H, W), sums to 1 over the pixels; None without tokens.
        normal_attention: the same of the normals; 0 where depth is invalid.
    """

    rgb: Tensor
    normal: Tensor
    rgb_attention: Tensor | None
    normal_attention: Tensor | None


def pooled_validity(valid: Tensor, size: tuple[int, int]) -> Tensor:
    """Where more than half of the pixels under a coarse pixel have depth, as 0 and 1, (B, 1, H, W)."""
    return (F.adaptive_avg_pool2d(valid, size) > 0.5).to(valid.dtype)


def _attention(logits_BJP: Tensor, valid_B1P: Tensor | None) -> Tensor:
    """Softmax over the pixels that are valid, in 32 bits where the type has fewer; all 0 where none is."""
    if valid_B1P is None:
        return logits_BJP.softmax(2)
    there, exact = valid_B1P > 0, full_precision(logits_BJP)
    least = torch.finfo(exact.dtype).min
    shifted = exact - exact.detach().masked_fill(~there, -torch.inf).amax(2, keepdim=True).clamp_min(least)
    weights = torch.where(there, shifted, 0.0).exp() * there
    return (weights / weights.sum(2, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)).to(logits_BJP.dtype)


class _TokenStream(nn.Module):
    """What one stream needs: its own tokens, and how it reads the other's."""

    def __init__(self, channels: int, other: int, tokens: int) -> None:
        super().__init__()
        width = max(1, channels // 4)
        self.width = width
        self.select = nn.Conv2d(channels, tokens, 1)
        self.query = nn.Linear(channels, width)
        self.key = nn.Linear(other, width, bias=False)
        self.value = nn.Linear(other, width, bias=False)
        self.out = nn.Linear(width, channels)
        self.gate = nn.Conv2d(2 * channels, 1, 1)
        self.scale = nn.Parameter(torch.zeros(()))

    def read(self, features_BCHW: Tensor, valid_B1HW: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, J, C) and where they were read (B, J, P)."""
        logits_BJP = self.select(features_BCHW).flatten(2)
        attention_BJP = _attention(logits_BJP, None if valid_B1HW is None else valid_B1HW.flatten(2))
        return attention_BJP @ features_BCHW.flatten(2).mT, attention_BJP

    def guidance(self, features_BCHW: Tensor, tokens_BJC: Tensor) -> Tensor:
        """G_m (B, C, H, W).

        Queries and outputs are never formed at full width: W_q^T k and W_o v are J vectors of C numbers, so the cost is J C
        per pixel in place of 2 C D.
        """
        keys_BJD, values_BJD = self.key(tokens_BJC), self.value(tokens_BJC)
        pixels_BCP = features_BCHW.flatten(2)
        logits_BJP = (keys_BJD @ self.query.weight) @ pixels_BCP + (keys_BJD @ self.query.bias).unsqueeze(2)
        shares_BJP = (logits_BJP / self.width**0.5).softmax(1)
        written_BJC = values_BJD @ self.out.weight.mT
        guided_BCP = written_BJC.mT @ shares_BJP + self.out.bias.unsqueeze(1)
        return guided_BCP.view_as(features_BCHW)

    def update(self, features_BCHW: Tensor, guidance_BCHW: Tensor, any_B111: Tensor | None) -> Tensor:
        """F + g b G; unguided where the other stream saw nothing."""
        gate = self.gate(torch.cat([features_BCHW, guidance_BCHW], 1)).sigmoid()
        gate = gate if any_B111 is None else gate * any_B111
        return features_BCHW + self.scale * gate * guidance_BCHW


class _ChannelStream(nn.Module):
    """A context vector of one stream, and the channel gates that it makes for the other."""

    def __init__(self, channels: int, other: int) -> None:
        super().__init__()
        hidden = max(4, channels // 16)
        self.select = nn.Conv2d(channels, 1, 1)
        self.gates = nn.Sequential(
            nn.Linear(other, hidden), nn.LayerNorm(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels)
        )
        self.scale = nn.Parameter(torch.zeros(()))

    def read(self, features_BCHW: Tensor, valid_B1HW: Tensor | None) -> Tensor:
        """The context (B, C)."""
        logits_B1P = self.select(features_BCHW).flatten(2)
        attention = _attention(logits_B1P, None if valid_B1HW is None else valid_B1HW.flatten(2))
        return (attention @ features_BCHW.flatten(2).mT).squeeze(1)

    def update(self, features_BCHW: Tensor, context_BC: Tensor, any_B111: Tensor | None) -> Tensor:
        """F (1 + g (2 sigmoid(h) - 1))."""
        gate = (2 * self.gates(context_BC).sigmoid() - 1)[:, :, None, None]
        gate = gate if any_B111 is None else gate * any_B111
        return features_BCHW * (1 + self.scale * gate)


class CrossGuidance(nn.Module):
    """Let the context of RGB guide the normals and the other way round; the identity when it is new.

    For each stream m with the other stream o, from the maps as they came:

        T_m = softmax_pixels(A_m F_m + log V) F_m^T,   G_m = W_o softmax_tokens((W_q F_m) (W_k T_o)^T / sqrt(D)) (W_v T_o)
        b_m = sigmoid(w [F_m, G_m]),                   F_m' = F_m + g_m b_m G_m,   g_m = 0 at the start, D = C / 4

    V is the validity of depth for the normals and 1 for RGB. Where a sample has no valid depth at all, RGB stays as it is.
    ``channel`` is the cheaper form F_m' = F_m (1 + g_m (2 sigmoid(h_o) - 1)) with h_o from one context vector of the other.
    The cost is linear in the pixels: J C per pixel.

    Args:
        channels: channels of the maps of RGB and of the normals.
        tokens: number of tokens J of each stream.
        mode: tokens, channel, or none (the maps as they are).

    Shapes: rgb (B, C_r, H, W), normal (B, C_n, H, W), valid (B, 1, H, W) of 0 and 1 at the same size -> ``Guided``.
    Source: "Cross-Modality Domain Adaptation for Freespace Detection", ACM MM 2022 names collaborative cross guidance; its
    equations were not available to us, and this form is our choice.

    Example:
        >>> guide = CrossGuidance((8, 8))  # the identity when new
        >>> rgb, normal = torch.randn(2, 8, 4, 5), torch.randn(2, 8, 4, 5)
        >>> torch.equal(guide(rgb, normal, torch.ones(2, 1, 4, 5)).rgb, rgb)
        True
    """

    def __init__(self, channels: tuple[int, int], tokens: int = 2, mode: GuidanceMode = "tokens") -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f"tokens: expected 1 or more, got {tokens}")
        self.mode = mode
        of_rgb, of_normal = channels
        if mode == "tokens":
            self.rgb: nn.Module = _TokenStream(of_rgb, of_normal, tokens)
            self.normal: nn.Module = _TokenStream(of_normal, of_rgb, tokens)
        elif mode == "channel":
            self.rgb, self.normal = _ChannelStream(of_rgb, of_normal), _ChannelStream(of_normal, of_rgb)
        elif mode != "none":
            raise ValueError(f"mode: expected tokens, channel or none, got {mode!r}")

    def forward(self, rgb: Tensor, normal: Tensor, valid: Tensor) -> Guided:
        """Guided maps of both streams."""
        if self.mode == "none":
            return Guided(rgb, normal, None, None)
        some = (valid > 0).flatten(1).any(1).to(rgb.dtype).view(-1, 1, 1, 1)
        if self.mode == "channel":
            assert isinstance(self.rgb, _ChannelStream)
            assert isinstance(self.normal, _ChannelStream)
            of_rgb, of_normal = self.rgb.read(rgb, None), self.normal.read(normal, valid)
            return Guided(self.rgb.update(rgb, of_normal, some), self.normal.update(normal, of_rgb, None), None, None)
        assert isinstance(self.rgb, _TokenStream)
        assert isinstance(self.normal, _TokenStream)
        rgb_tokens, at_rgb = self.rgb.read(rgb, None)
        normal_tokens, at_normal = self.normal.read(normal, valid)
        guided_rgb = self.rgb.update(rgb, self.rgb.guidance(rgb, normal_tokens), some)
        guided_normal = self.normal.update(normal, self.normal.guidance(normal, rgb_tokens), None)
        shape = (*at_rgb.shape[:2], *rgb.shape[-2:])
        return Guided(guided_rgb, guided_normal, at_rgb.view(shape), at_normal.view(shape))


def token_loss(attention: Tensor, road: Tensor, known: Tensor) -> Tensor:
    """Token 0 should read road and token 1 the rest: -mean_B log(mass where it belongs), over samples that have both.

    Args:
        attention: (B, J, H, W) with J >= 2, sums to 1 over the pixels.
        road: (B, 1, H, W), 1 on road.
        known: (B, 1, H, W), 0 where the label says nothing.
    """
    masses = [(attention[:, j : j + 1] * part * known).flatten(1).sum(1) for j, part in enumerate((road, 1 - road))]
    both = (((road * known).flatten(1).sum(1) > 0) & (((1 - road) * known).flatten(1).sum(1) > 0)).to(attention.dtype)
    logs = sum(-(mass.clamp_min(1e-6)).log() for mass in masses)
    found: Tensor = (both * logs).sum() / both.sum().clamp_min(1)
    return found
