"""One call of injected self-attention against the released code's way, and its cost in memory and with chosen keys.

The peer cannot be installed beside a current diffusers, so it is written out from its description: the whole softmax for
all 8 rows is made, thrown away, and made again. Ours is diffusers' own processor on the 2 rows that are read.
"""

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor
from visctrl.selection import ReferenceTokens, choose_keys

from tenfold.bench import Comparison, compare, counted, main
from tenfold.memory import MemoryProbe

WIDTH, HEADS, TOKENS = 320, 8, 1024


def official(attn: Attention, h: Tensor, reference: Tensor) -> Tensor:
    """Rows: reference, its copy, target, its reconstruction, each without and with prompt; the target's two are read."""
    rows = torch.cat([reference, reference, h[:1], h[:1], reference, reference, h[1:], h[1:]])

    def once() -> Tensor:
        q, k, v = (part(rows).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (attn.to_q, attn.to_k, attn.to_v))
        source = torch.tensor([0, 1, 0, 3, 4, 5, 4, 7])
        p = (q @ k[source].transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return attn.to_out[0]((p @ v[source]).transpose(1, 2).flatten(2))

    once()
    return once()[[2, 6]]


def close(a: Tensor, b: Tensor) -> str:
    """In which sense two results agree."""
    gap = float((a - b).abs().max())
    assert gap < 1e-5, gap
    return f"largest difference {gap:.1e}"


@torch.inference_mode()
def measure() -> list[Comparison]:
    """The comparisons."""
    torch.manual_seed(0)
    attn = Attention(query_dim=WIDTH, heads=HEADS, dim_head=WIDTH // HEADS).eval()
    h, reference = torch.randn(2, TOKENS, WIDTH), torch.randn(1, TOKENS, WIDTH)
    both, side = reference.expand(2, -1, -1), int(TOKENS**0.5)
    mask = torch.zeros(side, side)
    mask.view(-1)[: int(0.3 * TOKENS)] = 1
    keys = choose_keys(
        h, [ReferenceTokens(both, (side, side), mask)], "subject", own_mask=torch.ones(1, side, side), grid=(side, side)
    )
    assert keys is not None
    q, k, v = (torch.randn(2, HEADS, TOKENS, WIDTH // HEADS) for _ in range(3))
    some = keys.tokens.shape[1]
    hidden = torch.where(torch.arange(TOKENS) < some, 0.0, -torch.inf)[None]
    peaks = {}
    for number in (1024, 4096):
        x = torch.randn(1, number, WIDTH)
        with MemoryProbe() as probe:
            attn.processor(attn, x, x)
        peaks[number] = probe.peak_bytes
    return [
        compare(
            "injected_attention",
            lambda: attn.processor(attn, h, both),
            lambda: official(attn, h, reference),
            close,
            shape=f"{TOKENS} tokens of {WIDTH}, {HEADS} heads",
            required=">= 10",
            pairs=5,
        ),
        compare(
            "chosen_keys",
            lambda: F.scaled_dot_product_attention(q, k[..., :some, :], v[..., :some, :]),
            lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=hidden),
            close,
            shape=f"{some} of {TOKENS} keys; peer: the others hidden",
            required=">= 2",
        ),
        counted(
            "memory_of_four_times_the_tokens",
            peaks[1024],
            peaks[4096],
            unit="bytes",
            shape="1,024 tokens (ours), 4,096 (peer)",
            required="<= 4.5",
            equal="the same call",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main("visctrl", {}, measure))
