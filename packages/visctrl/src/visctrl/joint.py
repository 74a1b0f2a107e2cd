"""Attention over picture and text with the picture's keys from elsewhere: SD3 and Flux.

Keys and values of the picture are made of the given tokens, before normalization and rotary positions; the text keeps its
own. SD3 joins [picture; text], Flux [text; picture]. Shapes: B rows, N image tokens, T text tokens, H heads, M keys.
"""

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from visctrl.errors import ShapeMismatchError, UnsupportedModelError
from visctrl.selection import Keys

JOINT = {"joint": ("JointAttnProcessor2_0",), "flux": ("FluxAttnProcessor",)}
"""Processors whose attention this file knows, by kind of layer."""


def attend_joint(
    attn: Any,
    processor: Any,
    h: Tensor,
    text: Tensor | None,
    keys: Keys,
    ahead: int,
    rotary: tuple[Tensor, Tensor] | None,
    *,
    flux: bool,
) -> Any:
    """What a layer of SD3 or Flux returns when its image keys are made of ``keys``.

    Args:
        attn: the layer.
        processor: its processor, for the attention backend.
        h: image tokens; in Flux's blocks of one stream, the text's before them.
        text: text tokens of a block of two streams.
        keys: what the queries attend to besides the text.
        ahead: text tokens at the beginning of ``h``.
        rotary: cosine and sine of the positions, text before picture (Flux).
        flux: layout of Flux; else of SD3.

    Raises:
        ShapeMismatchError: a reference of another size with rotary positions.
        UnsupportedModelError: the attention backend takes no masks, and the keys weigh differently.
    """
    size = attn.to_q.out_features // attn.heads

    def heads(x: Tensor, norm: Any) -> Tensor:  # (B, N, H d) -> (B, N, H, d)
        x = x.view(*x.shape[:-1], attn.heads, size)
        if norm is None:
            return x
        return norm(x) if flux else norm(x.transpose(1, 2)).transpose(1, 2)

    q = heads(attn.to_q(h), attn.norm_q)
    k, v = heads(attn.to_k(keys.tokens), attn.norm_k), heads(attn.to_v(keys.tokens), None)
    if ahead:
        own = h[:, :ahead]
        text_k, text_v = heads(attn.to_k(own), attn.norm_k), heads(attn.to_v(own), None)
    elif text is not None:
        text_q = heads(attn.add_q_proj(text), attn.norm_added_q)
        text_k = heads(attn.add_k_proj(text), attn.norm_added_k)
        text_v = heads(attn.add_v_proj(text), None)
        q = torch.cat([text_q, q] if flux else [q, text_q], dim=1)
    else:
        text_k = text_v = k[:, :0]
    length = text_k.shape[1]
    if rotary is not None:
        if int(keys.positions.max()) + length >= rotary[0].shape[0]:
            raise ShapeMismatchError("a model with rotary positions needs a reference of the target's size")
        q = apply_rotary_emb(q, rotary, sequence_dim=1)
        if length:
            text_k = apply_rotary_emb(text_k, (rotary[0][:length], rotary[1][:length]), sequence_dim=1)
        place = keys.positions[0] + length  # all rows of a batch choose the same keys where positions are rotated
        if bool((keys.positions != keys.positions[:1]).any()):
            raise ShapeMismatchError("targets with different masks and rotary positions go one at a time")
        k = apply_rotary_emb(k, (rotary[0][place], rotary[1][place]), sequence_dim=1)
    bias = keys.bias
    if bias is not None:
        rest = bias.new_zeros(*bias.shape[:-1], length)
        bias = torch.cat([rest, bias] if flux else [bias, rest], dim=-1)[:, None].to(q.dtype)
    k = torch.cat([text_k, k] if flux else [k, text_k], dim=1)
    v = torch.cat([text_v, v] if flux else [v, text_v], dim=1)
    backend = getattr(processor, "_attention_backend", None)
    needed = (
        "keys that weigh differently (a bias, masks, several references) need an attention backend that takes masks,"
    )
    needed += " such as native"
    if bias is not None and not _takes_masks(backend):
        raise UnsupportedModelError(needed)
    try:
        out = dispatch_attention_fn(q, k, v, attn_mask=bias, backend=backend).flatten(2, 3).to(q.dtype)
    except ValueError as error:
        if bias is None:
            raise
        raise UnsupportedModelError(f"{needed} ({' '.join(str(error).split())})") from error
    if text is None:
        return attn.to_out[1](attn.to_out[0](out)) if hasattr(attn, "to_out") else out
    image, words = (out[:, length:], out[:, :length]) if flux else (out[:, : h.shape[1]], out[:, h.shape[1] :])
    image = attn.to_out[1](attn.to_out[0](image.contiguous()))
    if flux or not attn.context_pre_only:
        words = attn.to_add_out(words.contiguous())
    return image, words


def _takes_masks(backend: Any) -> bool:
    """Whether a backend has an argument for masks: diffusers drops in silence what a backend has no argument for."""
    name = AttentionBackendName(backend) if backend else _AttentionBackendRegistry.get_active_backend()[0]
    return "attn_mask" in _AttentionBackendRegistry._supported_arg_names[name]
