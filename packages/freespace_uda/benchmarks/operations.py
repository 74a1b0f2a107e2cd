"""Operations of a step of two ResNet-50 at 1248 x 384, by part, counted on tensors without numbers; memory of the guidance."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from freespace_uda import CrossGuidance, FreespaceNet, SelectiveAlignment
from freespace_uda.alignment import shared_forward
from freespace_uda.objectives import supervised
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tenfold.bench import Comparison, counted, main
from tenfold.memory import MemoryProbe

HEIGHT, WIDTH = 384, 1248


class Counter(TorchDispatchMode):
    """Operations of convolutions and products of matrices, as torch's own counter has them, without hooks on modules."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and compute."""
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


def operations(work: Callable[[], Tensor]) -> float:
    """GFLOPs of a computation and of its backward pass."""
    with Counter() as counter:
        work().backward()
    return counter.total / 1e9


class Step:
    """One step's parts, at 1 + 1 pictures, on tensors without numbers."""

    def __init__(self) -> None:
        with torch.device("meta"):
            self.net = FreespaceNet("timm:resnet50", width=128)
            self.align = SelectiveAlignment(self.net.feature_channels, hidden=128)
            self.rgb, self.normals = torch.rand(2, 3, HEIGHT, WIDTH), torch.rand(2, 3, HEIGHT, WIDTH)
            self.valid, self.labels = torch.ones(2, 1, HEIGHT, WIDTH), torch.zeros(1, HEIGHT, WIDTH, dtype=torch.uint8)
        self.maps = {
            name: [
                torch.empty(2, c, HEIGHT // r, WIDTH // r, device="meta", requires_grad=True)
                for c, r in zip(e.channels, e.reductions, strict=True)
            ]
            for name, e in self.net.encoders.items()
        }

    def whole(self) -> Tensor:
        """Everything that is differentiated."""
        out = self.net(self.rgb, self.normals, self.valid)
        loss = sum(supervised(x[:1], self.labels) for x in (out.fused, out.rgb, out.normal))
        return loss + self._aligned(out.features)

    def _aligned(self, features: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), device="meta")
        for name, d in self.align.discriminators.items():
            first, second = shared_forward(d, features[name][1:])
            total = total + first.mean() + second.square().mean() + d(features[name][:1].detach()).mean()
        return total

    def encoders(self) -> Tensor:
        """Both encoders."""
        four = torch.cat([self.normals, self.valid], 1)
        maps = [*self.net.encoders["rgb"](self.rgb), *self.net.encoders["normal"](four)]
        return torch.stack([m.mean() for m in maps]).sum()

    def guidance(self) -> Tensor:
        """Guidance at strides 8, 16 and 32."""
        total = torch.zeros((), device="meta")
        for i, guide in enumerate(self.net.guides):
            r, n = self.maps["rgb"][i], self.maps["normal"][i]
            out = guide(r, n, torch.ones(2, 1, *r.shape[-2:], device="meta"))
            total = total + out.rgb.mean() + out.normal.mean() + 0 * r.mean()
        return total

    def decoder(self) -> Tensor:
        """Decoder and heads."""
        heads = [head(self.maps[name][self.net.aligned]).mean() for name, head in self.net.heads.items()]
        return self.net._decode(list(self.maps.values())).mean() + torch.stack(heads).sum()

    def alignment(self) -> Tensor:
        """Both discriminators."""
        return self._aligned({name: maps[self.net.aligned] for name, maps in self.maps.items()})


def parts() -> Iterator[Comparison]:
    """Shares of the step."""
    step = Step()
    whole = operations(step.whole)
    shape = f"two ResNet-50, {WIDTH} x {HEIGHT}, 1 + 1"
    for name, work, most in (
        ("encoders", step.encoders, None),
        ("CrossGuidance", step.guidance, "<= 0.08"),
        ("alignment", step.alignment, "<= 0.06"),
        ("decoder", step.decoder, "<= 0.20"),
    ):
        own = operations(work)
        yield counted(
            f"{name}, of the whole step", own, whole, shape=shape, unit="GFLOP", required=most or "<= 1", equal="-",
            statistic="convolutions and products, forward and backward, counted", ratio=own / whole,
        )  # fmt: skip


class Plain:
    """A discriminator as functions."""

    def __init__(self, layers: Any) -> None:
        self.layers = layers

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights."""
        return self.layers.parameters()

    def __call__(self, x: Tensor) -> Tensor:
        """Logits."""
        for layer in self.layers:
            conv = isinstance(layer, nn.Conv2d)
            x = F.conv2d(x, layer.weight, layer.bias, 1, layer.padding) if conv else F.leaky_relu(x, 0.2)
        return x


def discriminator() -> Comparison:
    """One pass for both losses against two."""
    step = Step()
    d: Any = Plain(step.align.discriminators["rgb"])
    x = torch.empty(1, 512, HEIGHT // 8, WIDTH // 8, device="meta", requires_grad=True)
    s = torch.empty_like(x).detach()

    def shared() -> Tensor:
        first, second = shared_forward(d, x)
        return first.mean() + second.square().mean() + d(s).mean()

    def two() -> float:
        with Counter() as counter:
            for p in d.parameters():
                p.requires_grad_(False)
            d(x).mean().backward()
            for p in d.parameters():
                p.requires_grad_(True)
            (d(x.detach()).square().mean() + d(s).mean()).backward()
        return counter.total / 1e9

    name = "discriminator, two passes over the target"
    equal = "gradients equal to 1e-12 in 64 bits (test)"
    ours, peer = operations(shared), two()
    return counted(name, ours, peer, shape="512 x 48 x 156", unit="GFLOP", required=">= 1.1", equal=equal)


def memory() -> Comparison:
    """Peak of the guidance on twice as many pixels, over twice that on once as many."""
    peaks = []
    for rows in (48, 96):
        guide = CrossGuidance((64, 64))
        r, n, v = torch.rand(1, 64, rows, 156), torch.rand(1, 64, rows, 156), torch.ones(1, 1, rows, 156)
        with MemoryProbe(guide, r, n, v) as probe:
            kept = guide(r, n, v)
        peaks.append((probe.peak_bytes - probe.start_bytes) / 2**20)
        del kept
    name, shape = "CrossGuidance memory, twice the pixels / twice the memory", "64 x 48 x 156 and 64 x 96 x 156"
    return counted(name, peaks[1], 2 * peaks[0], shape=shape, unit="MiB", required=">= 0.95", equal="-")


def measure() -> list[Comparison]:
    """All rows."""
    return [*parts(), discriminator(), memory()]


if __name__ == "__main__":
    sys.exit(main("freespace-uda", {"torch": torch.__version__}, measure))
