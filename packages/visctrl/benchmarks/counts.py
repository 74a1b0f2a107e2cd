"""What is counted rather than timed: operations of controlled forward passes, and the bytes of a bank.

The peer is the plain forward pass of diffusers, and a bank of keys and values.
"""

from typing import Any

import diffusers
import torch
from rows import small_unet
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from visctrl import FeatureBank, SelfAttentionController, Source, self_attention_layers

from tenfold.bench import Comparison, counted, main


class Operators(TorchDispatchMode):
    """Counts the operators that reach torch's dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operator."""
        self.number += 1
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def measure() -> list[Comparison]:
    """The counts on a small U-Net."""
    torch.manual_seed(0)
    unet = small_unet(32)
    z, text = torch.randn(1, 4, 32, 32), torch.randn(1, 5, 32)

    def ask() -> Tensor:
        out: Tensor = unet(z, 500, text).sample
        return out

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            ask()
        return int(counter.get_total_flops())

    def operators() -> int:
        with Operators() as counter:
            ask()
        return counter.number

    plain, plain_operators, before = flops(), operators(), ask()
    bank, controller = FeatureBank(), SelfAttentionController()
    pairs: list[int] = []
    handles = [
        part.register_forward_hook(lambda _, __, out: pairs.append(out.nbytes))
        for layer in self_attention_layers(unet)
        for part in (unet.get_submodule(layer.name).to_k, unet.get_submodule(layer.name).to_v)
    ]
    with controller.attach(unet):
        off = operators()
        pairs.clear()
        with controller.recording(bank):
            recorded = ask()
        keys_and_values = sum(pairs)
        for handle in handles:
            handle.remove()
        with controller.recording(FeatureBank()):
            recording = flops()
        with controller.injecting([Source(bank)]):
            injecting, own = flops(), ask()
    assert torch.equal(recorded, before)
    assert float((own - before).abs().max()) < 1e-5
    shape = "small U-Net at 32 x 32, all self-attention"
    same = "a picture injected into itself: the plain output"
    return [
        counted("flops_injecting", injecting, plain, shape=shape, unit="FLOPs", required=">= 1", equal=same),
        counted("flops_recording", recording, plain, shape=shape, unit="FLOPs", required=">= 1", equal="bit for bit"),
        counted(
            "operators_off", off, plain_operators, shape=shape, unit="operators", required=">= 1", equal="bit for bit"
        ),
        counted(
            "bank_bytes",
            bank.nbytes,
            keys_and_values,
            shape=shape + "; peer: its keys and values",
            unit="bytes",
            required=">= 2",
            equal="the same layers of the same pass",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main("visctrl", {"diffusers": diffusers.__version__}, measure))
