"""Control over the self-attention of a network: record what it reads, or have it read what a reference recorded.

    controller = SelfAttentionController("1:", mode="replace")
    with controller.attach(unet):
        with controller.recording(bank):
            unet(reference_latents, t, ...)
        with controller.injecting([Source(bank)]):
            unet(target_latents, t, ...)

Processors are wrapped, not replaced: the one that was there does the attention, so LoRA, IP-Adapters, sliced attention and
offloading keep working. At the end of ``attach`` the very same objects are back. Steps are told apart by the timestep that
the network is called with, so that an aborted or an additional forward pass shifts nothing.
"""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visctrl.banks import FeatureBank, time_key
from visctrl.config import Mode
from visctrl.errors import AttachedError, ShapeMismatchError, UnsupportedModelError
from visctrl.joint import JOINT, attend_joint
from visctrl.layers import PLAIN, LayerInfo, select_layers, self_attention_layers, unwrapped
from visctrl.provenance import Trace
from visctrl.selection import Grid, Keys, ReferenceTokens, choose_keys


@dataclass(frozen=True)
class Source:
    """One reference to inject.

    Attributes:
        bank: its features; None where its rows are the first ones of the batch (they ride along, nothing is stored).
        grid: height and width of its latents; default: the target's.
        mask: where its subject is, (H, W) in [0, 1], for mode subject.
        log_weight: what is added to its keys' logits.
        number: its number among all references, for provenance.
    """

    bank: FeatureBank | None
    grid: Grid | None = None
    mask: Tensor | None = None
    log_weight: float = 0.0
    number: int = 0


@dataclass(frozen=True)
class _Recording:
    bank: FeatureBank


@dataclass(frozen=True)
class _Injecting:
    sources: Sequence[Source]
    times: frozenset[int] | None
    groups: int
    own_mask: Tensor | None
    riding: int


class SelfAttentionController:
    """Off, recording or injecting, in chosen layers of a network that it is attached to.

    Args:
        layers: layers, as an expression of ``select_layers``; numbers are in the order of execution.
        mode: what the target attends to: the reference (replace), both (union), its own background and the reference's
            foreground (subject).
        strength: share of the injected output; the rest is the target's own, from a second attention call.
        bias: added to the logits of the reference's keys, in modes union and subject.
        trust: further classes of processors that take keys and values from ``encoder_hidden_states``.

    Raises:
        ValueError: a strength outside of 0 to 1, or a mode that there is not.

    Source: Li et al., Tuning-Free Visual Customization via View Iterative Self-Attention Control, arXiv 2406.06258; union
    and bias are a choice of this package.

    Example:
        >>> controller = SelfAttentionController("10:15", mode="union", bias=2.0)
        >>> controller.mode  # until ``recording`` or ``injecting``
        'off'
    """

    def __init__(
        self,
        layers: str = "0:",
        *,
        mode: Mode = "replace",
        strength: float = 1.0,
        bias: float = 0.0,
        trust: Collection[type[Any]] = (),
    ) -> None:
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {strength}")
        if mode not in {"replace", "union", "subject"}:
            raise ValueError(f"mode must be replace, union or subject, got {mode!r}")
        self.expression = layers
        self.attention_mode: Mode = mode
        self.strength = strength
        self.bias = bias
        self.trust = tuple(trust)
        self.layers: list[LayerInfo] = []
        self.chosen: frozenset[int] = frozenset()
        self.injected = 0
        self.trace: Trace | None = None
        self.grid: Grid | None = None
        self._model: nn.Module | None = None
        self._state: _Recording | _Injecting | None = None
        self._time = 0.0
        self._text = 0
        self._asked = False

    @property
    def mode(self) -> Literal["off", "record", "inject"]:
        """What a forward pass does now."""
        if self._state is None:
            return "off"
        return "record" if isinstance(self._state, _Recording) else "inject"

    @contextlib.contextmanager
    def attach(self, model: nn.Module, *, grid: Grid | None = None) -> Iterator["SelfAttentionController"]:
        """Wrap the processors of a network's self-attention; at the end, after errors and Ctrl-C too, they are back.

        Args:
            model: the network. Of a compiled one, the module inside.
            grid: height and width of the latents, where the network is not called with (B, C, h, w).

        Raises:
            AttachedError: this controller or this network is under control already.
            UnsupportedModelError: no self-attention, fused projections, or a processor that is not known.
            ValueError: no such layer.
        """
        if self._model is not None:
            raise AttachedError("this controller is attached already")
        model = unwrapped(model)
        self.layers = self_attention_layers(model)
        self.chosen = frozenset(select_layers(self.expression, self.layers))
        modules = {layer.index: model.get_submodule(layer.name) for layer in self.layers}
        for layer in self.layers:
            _check(layer, modules[layer.index], self.trust if layer.index in self.chosen else (object,))
        self._model, self.grid, self.injected, self._asked = model, grid, 0, False
        arguments = list(inspect.signature(model.forward).parameters)
        saved = {index: (dict(module.__dict__), dict(module._modules)) for index, module in modules.items()}
        hook = model.register_forward_pre_hook(self._before(arguments), with_kwargs=True)
        try:
            for layer in self.layers:
                if layer.index in self.chosen:
                    _put(modules[layer.index], VisCtrlAttnProcessor(modules[layer.index].processor, layer, self))
            yield self
        finally:
            hook.remove()
            for index in self.chosen:
                attributes, children = saved[index]
                modules[index].__dict__.pop("processor", None)
                if "processor" in attributes:
                    modules[index].__dict__["processor"] = attributes["processor"]
                modules[index]._modules.clear()
                modules[index]._modules.update(children)
            self._model, self._state = None, None
        if self._asked and not self.injected:
            warnings.warn("nothing was injected: no forward pass met a chosen layer at a chosen timestep", stacklevel=2)

    @contextlib.contextmanager
    def recording(self, bank: FeatureBank) -> Iterator[FeatureBank]:
        """Within the block, forward passes put the tokens of the chosen layers into a bank."""
        with self._in(_Recording(bank)):
            yield bank

    @contextlib.contextmanager
    def injecting(
        self,
        sources: Sequence[Source],
        *,
        timesteps: Collection[float] | None = None,
        groups: int = 1,
        own_mask: Tensor | None = None,
        riding: int = 0,
    ) -> Iterator[None]:
        """Within the block, the chosen layers attend to the references.

        Args:
            sources: the references.
            timesteps: timesteps at which to inject; default: all.
            groups: guidance branches in a batch of targets: 2 for [unconditional; conditional].
            own_mask: where the subject of each target is, (T, H, W), for mode subject.
            riding: first rows of the batch that are references, for sources without a bank: all branches of the first
                reference, then of the next.

        Raises:
            ValueError: no sources.
        """
        if not sources:
            raise ValueError("injection needs at least one reference")
        times = None if timesteps is None else frozenset(map(time_key, timesteps))
        self._asked = True
        with self._in(_Injecting(sources, times, groups, own_mask, riding)):
            yield

    @contextlib.contextmanager
    def _in(self, state: _Recording | _Injecting) -> Iterator[None]:
        if self._model is None:
            raise AttachedError("attach the controller to a network first")
        before, self._state = self._state, state
        try:
            yield
        finally:
            self._state = before

    def _before(self, arguments: list[str]) -> Callable[..., None]:
        """Reads timestep, grid and length of the text from the call of the network."""

        def read(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self._state is None:
                return
            call = dict(zip(arguments, given, strict=False)) | named
            self._time = one_time(call.get("timestep"))
            sample = call.get("sample", call.get("hidden_states"))
            if isinstance(sample, Tensor) and sample.ndim == 4:
                self.grid = (sample.shape[-2], sample.shape[-1])
            text = call.get("encoder_hidden_states")
            self._text = text.shape[1] if isinstance(text, Tensor) else 0

        return read

    def acts(self, layer: int) -> bool:
        """Whether a layer has anything to do in this forward pass besides what it always does."""
        state = self._state
        if state is None or layer not in self.chosen:
            return False
        if isinstance(state, _Recording):
            return True
        return self.strength > 0 and (state.times is None or time_key(self._time) in state.times)

    def record(self, layer: int, tokens: Tensor) -> bool:
        """Put tokens into the bank of a recording; False where nothing is being recorded."""
        if not isinstance(self._state, _Recording):
            return False
        self._state.bank.put(self._time, layer, tokens)
        return True

    @property
    def riding(self) -> int:
        """First rows of the batch that are references."""
        return self._state.riding if isinstance(self._state, _Injecting) else 0

    @property
    def text_tokens(self) -> int:
        """Length of the text that the network was called with."""
        return self._text

    def keys(self, layer: int, own: Tensor, riding: Tensor) -> Keys | None:
        """What the target's queries attend to. Shapes: ``own`` (B, N, d), ``riding`` (R, N, d)."""
        state = self._state
        assert isinstance(state, _Injecting)
        references = []
        per_source = len(riding) // max(1, sum(source.bank is None for source in state.sources))
        at = 0
        for source in state.sources:
            if source.bank is None:
                found, at = riding[at : at + per_source], at + per_source
            else:
                found = source.bank.get(self._time, layer, own.device)
            if found.shape[-1] != own.shape[-1]:
                raise ShapeMismatchError(
                    f"layer {layer}: features of {found.shape[-1]} entries, expected {own.shape[-1]}"
                )
            grid = source.grid or self.grid or (1, own.shape[1])
            tokens = _spread(found.to(own.dtype), len(own), state.groups)
            references.append(ReferenceTokens(tokens, grid, source.mask, source.log_weight, source.number))
        keys = choose_keys(
            own, references, self.attention_mode, bias=self.bias, own_mask=state.own_mask, grid=self.grid
        )
        if keys is not None:
            self.injected += 1
            if self.trace is not None and self.trace.wants(layer, time_key(self._time)):
                self.trace.rows = len(own) // state.groups
        return keys

    def tracing(self, layer: int) -> Trace | None:
        """The trace that wants the attention of this layer in this forward pass."""
        return self.trace if self.trace is not None and self.trace.wants(layer, time_key(self._time)) else None


class VisCtrlAttnProcessor:
    """The processor that stands in for another one while a controller is attached.

    Args:
        inner: the processor that was there.
        layer: its layer.
        controller: what to do.
    """

    def __init__(self, inner: Any, layer: LayerInfo, controller: SelfAttentionController) -> None:
        self.inner = inner
        self.layer = layer
        self.controller = controller
        # diffusers drops the keyword arguments that a processor's signature does not name: it has to see the inner one's
        shown: Any = lambda *args, **kwargs: VisCtrlAttnProcessor.__call__(self, *args, **kwargs)  # noqa: E731
        shown.__signature__ = inspect.signature(inner.__call__)
        self.__dict__["__call__"] = shown

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """What the inner processor returns, of the tokens that the controller chooses."""
        c, h = self.controller, hidden_states
        crossing = self.layer.kind == "plain" and encoder_hidden_states is not None
        if crossing or not c.acts(self.layer.index):
            return self.inner(attn, h, encoder_hidden_states, attention_mask, *args, **kwargs)
        if self.layer.kind != "plain":
            return self._joint(attn, h, encoder_hidden_states, attention_mask, *args, **kwargs)
        tokens = _read(attn, h)
        if c.record(self.layer.index, tokens):
            return self.inner(attn, h, encoder_hidden_states, attention_mask, *args, **kwargs)
        if attention_mask is not None:
            raise UnsupportedModelError(f"layer {self.layer.name}: injection beside an attention mask is not known")
        first = c.riding
        keys = c.keys(self.layer.index, tokens[first:], tokens[:first])
        if keys is None:
            return self.inner(attn, h, encoder_hidden_states, attention_mask, *args, **kwargs)
        trace = c.tracing(self.layer.index)
        if trace is not None:
            trace.take(attn, tokens[first:], keys)
        bias = None if keys.bias is None else keys.bias.to(h.dtype)
        out = self.inner(attn, h[first:], keys.tokens, bias, *args, **kwargs)
        if c.strength < 1:
            out = torch.lerp(self.inner(attn, h[first:], None, None, *args, **kwargs), out, c.strength)
        if first:
            out = torch.cat([self.inner(attn, h[:first], None, None, *args, **kwargs), out])
        return out

    def _joint(self, attn: Any, h: Tensor, text: Tensor | None, mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """Attention over picture and text: the picture's keys come from the reference, the text's stay."""
        c = self.controller
        ahead = (
            0 if text is not None or self.layer.kind == "joint" else c.text_tokens
        )  # Flux: text first, in one stream
        tokens = h[:, ahead:]
        if c.record(self.layer.index, tokens):
            return self.inner(attn, h, text, mask, *args, **kwargs)
        if c.riding:
            raise UnsupportedModelError("references that ride in the batch are for plain self-attention: use a bank")
        keys = c.keys(self.layer.index, tokens, tokens[:0])
        if keys is None:
            return self.inner(attn, h, text, mask, *args, **kwargs)
        rotary = kwargs.get("image_rotary_emb", args[0] if args else None)
        out = attend_joint(attn, self.inner, h, text, keys, ahead, rotary, flux=self.layer.kind == "flux")
        if c.strength == 1:
            return out
        own = self.inner(attn, h, text, mask, *args, **kwargs)
        if isinstance(own, tuple):
            return tuple(torch.lerp(a, b, c.strength) for a, b in zip(own, out, strict=True))
        return torch.lerp(own, out, c.strength)


def _read(attn: Any, h: Tensor) -> Tensor:
    """The tokens of which a layer makes its own keys: flattened and, where the layer norms by groups, normed."""
    tokens = h.flatten(2).transpose(1, 2) if h.ndim == 4 else h
    return attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2) if attn.group_norm is not None else tokens


def _spread(found: Tensor, rows: int, groups: int) -> Tensor:
    """Features of G branches in the rows of a batch of targets; one branch serves all. Shapes: (G, N, d) -> (rows, N, d)."""
    found = found[-groups:]
    if rows % max(1, len(found)):
        raise ShapeMismatchError(f"{len(found)} guidance branches of features for a batch of {rows} rows")
    return found.expand(rows, -1, -1) if len(found) == 1 else found.repeat_interleave(rows // len(found), dim=0)


def one_time(timestep: Any) -> float:
    """The timestep of a call.

    Raises:
        ValueError: several in one batch, or none.
    """
    if isinstance(timestep, Tensor):
        if timestep.numel() > 1 and not bool((timestep == timestep.flatten()[0]).all()):
            raise ValueError("a batch with several timesteps cannot be controlled: call the network once per timestep")
        return float(timestep.flatten()[0])
    if timestep is None:
        raise ValueError("the network was called without a timestep")
    return float(timestep)


def _check(layer: LayerInfo, attn: Any, trust: tuple[type[Any], ...]) -> None:
    """Make sure that a layer's processor is one that can be wrapped.

    Raises:
        AttachedError: it is under control already.
        UnsupportedModelError: it is of a kind that is not known.
    """
    if isinstance(attn.processor, VisCtrlAttnProcessor):
        raise AttachedError(f"layer {layer.name} is under the control of another controller")
    if trust == (object,):
        return
    name = type(attn.processor).__name__
    # unfusing a U-Net puts its processors back and leaves the flag, which only Flux and SD3 look at
    if name.startswith("Fused") or (layer.kind != "plain" and getattr(attn, "fused_projections", False)):
        raise UnsupportedModelError(
            f"layer {layer.name} has fused projections: call unfuse_qkv_projections() on the model or pipeline first"
        )
    if getattr(attn, "norm_cross", None) or getattr(attn, "spatial_norm", None) is not None:
        raise UnsupportedModelError(f"layer {layer.name} norms keys from elsewhere in a way of its own")
    known = PLAIN if layer.kind == "plain" else JOINT[layer.kind]
    if name not in known and not isinstance(attn.processor, trust):
        raise UnsupportedModelError(
            f"layer {layer.name} has the processor {name}, of which it is not known whether it takes keys from elsewhere:"
            f" known are {', '.join(known)}; set one of them, or name its class in trust="
        )


def _put(attn: Any, processor: VisCtrlAttnProcessor) -> None:
    attn._modules.pop("processor", None)
    attn.__dict__["processor"] = processor
