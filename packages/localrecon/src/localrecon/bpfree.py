"""Training without back-propagation: each module is one layer with a linear head, its gradients in closed form.

No autograd graph is made anywhere: an error passes through one layer's activation and never through a second layer.
"""

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from localrecon.config import Feedback, SGRConfig
from localrecon.heads import simplex_etf
from localrecon.reconcile import distance
from localrecon.step import ModuleReport, StepReport
from tenfold import UserError

Activation = Literal["relu", "tanh", "gelu", "identity"]
Head = Literal["trainable", "fixed", "etf"]
LossName = Literal["ce", "squared"]


def activate(a: Tensor, name: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """phi(a), phi'(a) and phi''(a), elementwise."""
    if name == "relu":
        on = (a > 0).to(a.dtype)
        return a * on, on, torch.zeros_like(a)
    if name == "tanh":
        h = a.tanh()
        slope = 1 - h * h
        return h, slope, -2 * h * slope
    if name == "gelu":
        density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
        share = 0.5 * (1 + torch.erf(a / math.sqrt(2)))
        return a * share, share + a * density, (2 - a * a) * density
    return a, torch.ones_like(a), torch.zeros_like(a)


class _Layer(nn.Module):
    """a = W x + b, h = phi(a), z = V m(h), where m is the mean over positions; and the closed form of all its gradients.

    With e = softmax(z) - y (or z - y), e~ = e B and B the feedback weights (V for transpose):
        g_out = m*(e~),  dl = phi'(a) g_out,  grad W = dl x^T / N,  grad V = e^T m(h) / N,  g_in = W^T dl
    and for R = (1/N) sum |u|^2, u = g_in - T:
        q = W u,  t = phi'(a) q,  s0 = V m(t),  m0 = J s0 (J = diag p - p p^T, or 1),
        s = phi''(a) g_out q + phi'(a) m*(B^T m0)
        grad W R = (2/N)(dl u^T + s x^T),  grad b R = (2/N) sum s,  grad V R = (2/N)(e^T m(t) + m0^T m(h))
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self, features: int, classes: int, activation: Activation, feedback: Feedback, head: Head, loss: LossName
    ) -> None:
        super().__init__()
        if activation not in {"relu", "tanh", "gelu", "identity"}:
            raise UserError(f"activation must be relu, tanh, gelu or identity, got {activation}")
        if feedback not in {"transpose", "fa", "sign"}:
            raise UserError(f"feedback must be transpose, fa or sign, got {feedback}")
        self.activation, self.feedback, self.loss = activation, feedback, loss
        start = simplex_etf(classes, features) if head == "etf" else torch.randn(classes, features)
        scale = 1.0 if head == "etf" else 1 / math.sqrt(features)
        self.head = nn.Parameter(start * scale, requires_grad=head == "trainable")
        self.register_buffer("fixed", torch.randn(classes, features) / math.sqrt(features))

    def take(self, plain: nn.Linear | nn.Conv2d) -> None:
        """W and b of a plain layer, started for ReLU."""
        self.weight, self.bias = cast("nn.Parameter", plain.weight), cast("nn.Parameter", plain.bias)
        nn.init.kaiming_normal_(self.weight)
        nn.init.zeros_(self.bias)

    def feedback_weights(self) -> Tensor:
        """B (C, D): V itself, fixed random ones, or the signs of V at V's mean size."""
        if self.feedback == "transpose":
            return self.head
        if self.feedback == "fa":
            return cast("Tensor", self.fixed)
        return self.head.sign() * self.head.abs().mean()

    # What differs between vectors and maps

    def apply_weight(self, x: Tensor, *, bias: bool) -> Tensor:
        """W x, with or without b."""
        raise NotImplementedError

    def to_input(self, d: Tensor, x: Tensor) -> Tensor:
        """W^T d, of the shape of x."""
        raise NotImplementedError

    def weight_gradient(self, d: Tensor, x: Tensor) -> Tensor:
        """sum d x^T."""
        raise NotImplementedError

    def mean(self, h: Tensor) -> Tensor:
        """m(h) (B, D)."""
        return h.flatten(2).mean(dim=2) if h.ndim == 4 else h

    def spread(self, e: Tensor, like: Tensor) -> Tensor:
        """m*(e), the transpose of the mean."""
        return (e / like[0, 0].numel())[:, :, None, None].expand_as(like) if like.ndim == 4 else e

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The layer's output h."""
        return activate(self.apply_weight(x, bias=True), self.activation)[0]

    @torch.no_grad()
    def logits(self, h: Tensor) -> Tensor:
        """z of the layer's output."""
        return self.mean(h) @ self.head.T

    @torch.no_grad()
    def local_gradients(
        self, x: Tensor, y: Tensor, target: Tensor | None, lam: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Put the gradients of L + lambda R into ``.grad``.

        Args:
            x: input (B, ...).
            y: labels (B,) int64.
            target: T per sample, like x; None for the first layer.
            lam: lambda.

        Returns:
            Output h, per-sample gradient g_out (the next layer's target), and ``loss``, ``correct``, ``R``, ``cosine``.
        """
        n = x.shape[0]
        a = self.apply_weight(x, bias=True)
        h, slope, curve = activate(a, self.activation)
        mean_h = self.mean(h)
        z = mean_h @ self.head.T
        truth = F.one_hot(y, z.shape[1]).to(z.dtype)
        p = z.softmax(dim=1)
        e = (p if self.loss == "ce" else z) - truth
        loss = F.cross_entropy(z, y) if self.loss == "ce" else 0.5 * (z - truth).square().sum() / n
        back = self.feedback_weights()
        g_out = self.spread(e @ back, h)
        dl = slope * g_out
        gradients = {"weight": self.weight_gradient(dl, x), "bias": self._positions(dl), "head": e.T @ mean_h}
        found = {"loss": loss, "correct": (z.argmax(dim=1) == y).sum()}
        if target is not None and lam:
            g_in = self.to_input(dl, x)
            u = g_in - target
            q = self.apply_weight(u, bias=False)
            t = slope * q
            s0 = self.mean(t) @ self.head.T
            m = p * s0 - p * (p * s0).sum(dim=1, keepdim=True) if self.loss == "ce" else s0
            s = curve * g_out * q + slope * self.spread(m @ back, h)
            gradients["weight"] += 2 * lam * (self.weight_gradient(dl, u) + self.weight_gradient(s, x))
            gradients["bias"] += 2 * lam * self._positions(s)
            gradients["head"] += 2 * lam * (e.T @ self.mean(t) + m.T @ mean_h)
            found["R"] = distance(g_in, target, n, "sample")
            found["cosine"] = F.cosine_similarity(g_in.flatten(1), target.flatten(1), dim=1).mean()
        for name, gradient in gradients.items():
            parameter = getattr(self, name)
            if parameter.requires_grad:
                parameter.grad = gradient / n
        return h, g_out.contiguous(), found

    @staticmethod
    def _positions(d: Tensor) -> Tensor:
        return d.sum(dim=(0, 2, 3)) if d.ndim == 4 else d.sum(dim=0)


class BPFreeLinear(_Layer):
    """A linear layer that trains itself, (B, I) -> (B, D).

    Args:
        inputs: number of inputs I.
        features: number of outputs D.
        classes: number of classes of its head.
        activation: relu, tanh, gelu or identity.
        feedback: what carries the head's error back. transpose, fa (feedback alignment: fixed random) or sign.
        head: trainable, fixed (random) or etf (simplex equiangular tight frame, fixed).
        loss: ce or squared (half the squared error of the one-hot label).

    Example:
        >>> BPFreeLinear(16, 8, classes=10)(torch.randn(2, 16)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        classes: int,
        activation: Activation = "relu",
        feedback: Feedback = "transpose",
        head: Head = "trainable",
        loss: LossName = "ce",
    ) -> None:
        super().__init__(features, classes, activation, feedback, head, loss)
        self.take(nn.Linear(inputs, features))

    def apply_weight(self, x: Tensor, *, bias: bool) -> Tensor:
        """W x, with or without b."""
        return F.linear(x, self.weight, self.bias if bias else None)

    def to_input(self, d: Tensor, x: Tensor) -> Tensor:
        """W^T d, of the shape of x."""
        return d @ self.weight

    def weight_gradient(self, d: Tensor, x: Tensor) -> Tensor:
        """sum d x^T."""
        return d.T @ x


class BPFreeConv2d(_Layer):
    """A convolution that trains itself, (B, I, H, W) -> (B, D, H', W'); its head sees the mean over positions.

    Args:
        inputs: number of input channels I.
        features: number of output channels D.
        kernel: side of the kernel, padded to keep the size at stride 1.
        stride: stride of the convolution.
        classes: number of classes of its head.
        activation: relu, tanh, gelu or identity.
        feedback: what carries the head's error back. transpose, fa (feedback alignment: fixed random) or sign.
        head: trainable, fixed (random) or etf (simplex equiangular tight frame, fixed).
        loss: ce or squared (half the squared error of the one-hot label).

    Example:
        >>> layer = BPFreeConv2d(3, 8, kernel=3, stride=2, classes=10)
        >>> layer(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        kernel: int,
        stride: int,
        classes: int,
        activation: Activation = "relu",
        feedback: Feedback = "transpose",
        head: Head = "trainable",
        loss: LossName = "ce",
    ) -> None:
        super().__init__(features, classes, activation, feedback, head, loss)
        self.stride, self.padding = stride, kernel // 2
        self.take(nn.Conv2d(inputs, features, kernel))

    def apply_weight(self, x: Tensor, *, bias: bool) -> Tensor:
        """W x, with or without b."""
        return F.conv2d(x, self.weight, self.bias if bias else None, self.stride, self.padding)

    def to_input(self, d: Tensor, x: Tensor) -> Tensor:
        """W^T d, of the shape of x."""
        return conv2d_input(x.shape, self.weight, d, self.stride, self.padding)  # type: ignore[no-untyped-call]

    def weight_gradient(self, d: Tensor, x: Tensor) -> Tensor:
        """sum d x^T."""
        return conv2d_weight(x, self.weight.shape, d.contiguous(), self.stride, self.padding)  # type: ignore[no-untyped-call]


class BPFreeNet(nn.Module):
    """Layers that train themselves one after another; the last one's head is the net's output.

    Args:
        layers: ``BPFreeConv2d`` and then ``BPFreeLinear``; maps are averaged over positions before the first linear one.

    Shapes: (B, ...) -> logits (B, C).

    Example:
        >>> net = BPFreeNet([BPFreeConv2d(3, 8, kernel=3, stride=1, classes=10), BPFreeLinear(8, 6, classes=10)])
        >>> net(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, layers: Sequence[BPFreeLinear | BPFreeConv2d]) -> None:
        super().__init__()
        if not layers:
            raise UserError("a BPFreeNet needs at least one layer")
        self.layers = nn.ModuleList(layers)

    @property
    def k(self) -> int:
        """Number of layers, each a module of its own."""
        return len(self.layers)

    def parameters_of(self, k: int) -> list[nn.Parameter]:
        """What layer k (from 0 on) trains."""
        return [p for p in self.layers[k].parameters() if p.requires_grad]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Logits of the last layer's head."""
        return self.forward_exits(x)[-1]

    @torch.no_grad()
    def forward_exits(self, x: Tensor) -> list[Tensor]:
        """Logits of every layer's head."""
        exits = []
        for i, layer in enumerate(self.layers):
            x = layer(_enter(layer, x, first=i == 0))
            exits.append(cast("_Layer", layer).logits(x))
        return exits

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        y: Tensor,
        optimizers: Sequence[torch.optim.Optimizer],
        sgr: SGRConfig | None = None,
        step: int = 0,
        total_steps: int | None = None,
    ) -> StepReport:
        """One step: each layer finds its gradients in closed form and is updated at once.

        The reconciliation has the distance ``sample`` and is exact; of ``sgr``, lam, every, ramp and anneal_last count.

        Args:
            x: inputs (B, ...).
            y: labels (B,) int64.
            optimizers: one per layer, of ``parameters_of(k)``.
            sgr: the reconciliation; default ``SGRConfig()``.
            step: number of the step, from 0 on.
            total_steps: length of the training, for the ramps; None is no ramp.
        """
        lam = (sgr or SGRConfig()).strength(step, total_steps)
        target, reports = None, []
        for i, (layer, optimizer) in enumerate(zip(self.layers, optimizers, strict=True)):
            entered = _enter(layer, x, first=i == 0)
            if target is not None and entered.ndim != x.ndim:
                target = target.flatten(2).sum(dim=2)  # gradient at the mean over positions
            x, target, found = cast("_Layer", layer).local_gradients(entered, y, target, lam)
            optimizer.step()
            for parameter in layer.parameters():
                parameter.grad = None
            extra = (float(found["R"]), float(found["cosine"])) if "R" in found else (None, None)
            reports.append(ModuleReport(float(found["loss"]), float(found["correct"]) / len(y), *extra))
        return StepReport(tuple(reports))


def _enter(layer: nn.Module, x: Tensor, *, first: bool) -> Tensor:
    if isinstance(layer, BPFreeLinear) and x.ndim == 4:
        return x.flatten(1) if first else x.flatten(2).mean(dim=2)
    return x
