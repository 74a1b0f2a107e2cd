"""Which tokens of a layer's input count, and to which sample each belongs, followed through a model while it runs.

A model may carry several streams of tokens at once: an encoder's and a decoder's, text and images, audio at two rates, the
rows that are routed to an expert. Each call of a module that holds targets opens a *frame*, which says what streams are in
it: from the masks that the module is given, else from the frame around it. A layer's input is looked up in the innermost
frame that it fits, in this order: what was made of the states that a module attends to alone (keys and values of
cross-attention, also normalized ones: see ``provenance``), the shape (B, T) of a mask, rows that are copies of tokens
(experts, poolers), one row per sample. What fits nothing although there is padding, or two masks that differ, is counted
whole and reported by name, never guessed. What is only supposed (one row per sample, say) is a *doubt*, to be settled by
``doubts``.

Shapes: B samples of T tokens; R rows of several samples in one dimension; n inputs.
"""

import contextlib
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from corda.masks import as_tokens, shortened, without_first
from corda.provenance import Provenance
from corda.rows import matching_rows
from tenfold import UserError

TokenChoice = Literal["all", "labels"] | Callable[[Mapping[str, Any]], Tensor]
"""Which tokens count: all that are not padding, those with a label, or those that a function of the batch says."""
IGNORED = -100
"""Label of a token that no loss is computed for."""
TEXT = ("input_ids", "inputs_embeds")
SIGHT_AND_SOUND = ("pixel_values", "input_features", "input_values")
DECODER = ("decoder_input_ids", "decoder_inputs_embeds")
READ = "read"
"""Mark of what was made of a text that is given beside pictures or sound."""
CROSS = ("encoder_hidden_states", "key_value_states", "cross_attention_states", "memory", "context")


@dataclass(frozen=True)
class Tokens:
    """What of one input of a layer counts.

    Attributes:
        keep: (B, T) or (R,), False for what does not count; None where all counts.
        sample: (R,) number of the sample that each row belongs to, or the number of samples into which the rows are cut
            evenly; None where the first dimension of three holds the samples, or two hold one.
    """

    keep: Tensor | None = None
    sample: Tensor | int | None = None


@dataclass(frozen=True)
class Stream:
    """Tokens that belong together.

    Attributes:
        batch: B.
        keep: (B, T); None where every token counts.
        owner: module that knows how many tokens become of a mask's entries (audio), if there is one.
        sight: whether it holds what was made of pictures or sound beside a text, and of none of that text.
    """

    batch: int
    keep: Tensor | None = None
    owner: Any = None
    sight: bool = False

    def over(self, shape: Sequence[int]) -> Tensor | None:
        """The mask for tokens (B, T), where it fits them; None where all count.

        Raises:
            LookupError: it does not fit.
        """
        if shape[0] != self.batch:
            raise LookupError
        if self.keep is None or self.keep.shape == tuple(shape):
            return self.keep
        shorter = shortened(self.keep, shape[1], self.owner)
        if shorter is None:
            raise LookupError
        return shorter

    @property
    def padded(self) -> bool:
        """Whether there is anything that does not count."""
        return self.keep is not None and not bool(self.keep.all())


@dataclass(frozen=True)
class Rows:
    """An input in two dimensions: its layer, its number of rows, and what of it counts."""

    name: str
    count: int
    tokens: Tokens


@dataclass
class Frame:
    """One call of a module, and the streams in it."""

    module: nn.Module
    number: int = 0
    """Of this call, in the marks of ``provenance``."""
    own: Stream | None = None
    """Of what the module itself works on; of an encoder-decoder, the decoder's."""
    attending: bool = False
    """Whether that is what was made of the states which a module around it attends to."""
    encoder: Stream | None = None
    cross: Stream | None = None
    others: list[Stream] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    source: Tensor | None = None
    cross_source: Tensor | None = None
    rows: Rows | None = None
    """The latest input in two dimensions of a layer in the module itself."""

    @property
    def streams(self) -> list[Stream]:
        """All streams, the likeliest first."""
        return [s for s in (self.own, self.cross, self.encoder, *self.others) if s is not None]


class Streams:
    """Follows the streams of a model through the calls of its modules.

    Args:
        model: the model.
        targets: names of the layers whose inputs are looked up.
        tokens: which tokens count; ``labels`` and a function speak of the text, in an encoder-decoder of the decoder's.
        skip_first: number of tokens at the start of each sample that do not count.
        rows_are_tokens: whether a model's input in two dimensions is one sample of many tokens, as peft takes it, and not
            one token of many samples.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Iterable[str],
        *,
        tokens: TokenChoice = "all",
        skip_first: int = 0,
        rows_are_tokens: bool = False,
    ) -> None:
        if not callable(tokens) and tokens not in ("all", "labels"):
            raise UserError(f"tokens: expected all, labels or a function of the batch, got {tokens!r}")
        self.tokens = tokens
        self.skip_first = skip_first
        self.rows_are_tokens = rows_are_tokens
        self.labels: Tensor | None = None
        """Of the present batch, if the model is not given them."""
        self.batch = -1
        self.outweighed = False
        """Whether a sample that outweighs the others has been named."""
        self.frames: list[Frame] = []
        self.unknown: dict[str, str] = {}
        """Layer -> its input that fits no stream although there is padding, or although it mixes samples."""
        self.doubts: dict[str, Callable[[], Any] | None] = {}
        """Layer -> the batch, if it is known, where it was only supposed which rows belong to which sample."""
        self.recall: Callable[[], Any] | None = None
        """Gives the present batch, if it is known."""
        self._provenance: Provenance | None = None
        self._followed_from: Frame | None = None
        self._numbers = itertools.count(1)
        paths = {"", *(path for name in targets for path in _above(name))}
        self._hooked = [module for name, module in model.named_modules() if name in paths]
        self._counts = False

    @contextlib.contextmanager
    def attached(self, *, counts: bool = False) -> Iterator[None]:
        """Within, calls are followed.

        Args:
            counts: whether each outermost call is a batch; otherwise ``batch`` is set from outside.
        """
        hooks: list[Any] = []
        self._counts = counts
        for module in self._hooked:
            hooks.append(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
            hooks.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            if self._followed_from is not None:
                self._left([self._followed_from])
            self.frames = []
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def within(self, frames: Sequence[Frame]) -> Iterator[None]:
        """Within, calls are followed as if they were made inside of these frames."""
        before, self.frames = self.frames, list(frames)
        try:
            yield
        finally:
            self.frames = before

    def around(self, module: nn.Module) -> list[Frame]:
        """The open frames without that of ``module``, holding masks but no inputs."""
        frames = [frame for frame in self.frames if frame.module is not module]
        return [
            Frame(f.module, own=f.own, encoder=f.encoder, cross=f.cross, others=list(f.others), attending=f.attending)
            for f in frames
        ]

    def of(self, name: str, x: Tensor) -> Tokens:
        """What counts of the input of a layer."""
        found = self._of_rows(name, x) if x.ndim == 2 else self._of_sequences(name, x)
        if x.ndim == 2 and self.frames:
            self.frames[-1].rows = Rows(name, len(x), found)
        return found

    def warn(self) -> None:
        """One warning for all layers whose tokens could not be told apart."""
        if self.unknown:
            (name, reason), *more = self.unknown.items()
            others = f" (and {len(more)} other layers, such as {more[-1][0]})" if more else ""
            warnings.warn(f"layer {name}{others}: {reason}", stacklevel=4)

    # Frames

    def _enter(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = {**dict(zip(_parameters(module), args, strict=False)), **keywords}
        frame = Frame(module, next(self._numbers), given=given)
        outer = self.frames[-1] if self.frames else None
        if outer is None and self._counts:
            self.batch += 1
        self.frames.append(frame)
        frame.cross_source = next((given[key] for key in CROSS if isinstance(given.get(key), Tensor)), None)
        sights = [given[key] for key in SIGHT_AND_SOUND if isinstance(given.get(key), Tensor)]
        texts = [given[key] for key in TEXT if isinstance(given.get(key), Tensor)]
        first = next((value for value in given.values() if isinstance(value, Tensor)), None)
        frame.source = (texts or sights or [first])[0]
        if frame.source is None:
            frame.own = outer.own if outer else None
            return
        two_sided = outer is None or outer.encoder is not None
        if any(key in _parameters(module) for key in DECODER) and two_sided:
            self._enter_both(frame, outer)
        elif frame.cross_source is not None:
            frame.own = self._own(frame, outer, outer.own if outer else None)
            frame.cross = _cross(frame, outer)
            self._follow(frame)
        elif sights and not texts:
            frame.own = self._seen(frame, outer, sights[0])
        else:
            frame.own = self._own(frame, outer, (outer.encoder or outer.own) if outer else None)
        if texts:
            frame.others += [Stream(len(sight), sight=True) for sight in sights]
        if outer is None and frame.own is not None and frame.encoder is None:
            frame.own = Stream(frame.own.batch, self._chosen(frame, frame.own.keep, text=True), frame.own.owner)
        if sights and self._follows(frame, bool(texts)):
            assert self._provenance is not None
            for text in texts:
                self._provenance.mark(text, READ)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while self.frames:
            frame = self.frames.pop()
            self._left([frame])
            if frame.module is module:
                break

    def _follow(self, frame: Frame) -> None:
        """Inside of a module that attends to other states than its own: what is made of which? Where masks may differ."""
        if frame.source is None or frame.cross_source is None or frame.source is frame.cross_source:
            return
        if self._follows(frame):
            assert self._provenance is not None
            self._provenance.mark(frame.source, (frame.number, "own"))
            self._provenance.mark(frame.cross_source, (frame.number, "cross"))

    def _follows(self, frame: Frame, begin: bool = True) -> bool:
        """Whether what is computed is followed, from this frame on if there is padding and nothing was followed before."""
        if self._provenance is None and begin and self._padded():
            self._provenance, self._followed_from = Provenance(), frame
            self._provenance.__enter__()
        return self._provenance is not None

    def _marks(self, x: Tensor) -> frozenset[Any]:
        return frozenset() if self._provenance is None else self._provenance.of(x)

    def _left(self, frames: Sequence[Frame]) -> None:
        if self._provenance is not None and any(frame is self._followed_from for frame in frames):
            self._provenance.__exit__(None, None, None)
            self._provenance = self._followed_from = None

    def _attended(self, x: Tensor) -> int | None:
        """Place of the innermost frame whose other states x was made of, and of nothing of its own; None if there is none."""
        marks = self._marks(x)
        for place, frame in reversed(list(enumerate(self.frames))):
            if frame.cross_source is not None:
                sides = {mark[1] for mark in marks if isinstance(mark, tuple) and mark[0] == frame.number}
                if x is frame.cross_source or sides == {"cross"}:
                    return place
                if sides:
                    return None
        return None

    def _enter_both(self, frame: Frame, outer: Frame | None) -> None:
        """An encoder-decoder: what lies in it directly belongs to the decoder."""
        assert frame.source is not None
        given, batch = frame.given, len(frame.source)
        mask = as_tokens(given.get("attention_mask"))
        inherited = outer.encoder if outer and outer.encoder else None
        if mask is None and inherited:
            frame.encoder = inherited
        else:
            frame.encoder = Stream(batch, mask, _owner(frame.module))
        own = as_tokens(given.get("decoder_attention_mask"))
        if own is None and outer and outer.encoder:
            frame.own = outer.own
            return
        labels = self._labels(frame)
        if own is None and labels is not None and all(given.get(key) is None for key in DECODER[1:]):
            own = labels != IGNORED
        if outer is None:
            own = self._chosen(frame, own, text=True)
        frame.own = Stream(batch, own)

    def _own(self, frame: Frame, outer: Frame | None, inherited: Stream | None) -> Stream | None:
        """Of a module that is given text or hidden states: its own mask, else what is known from around it."""
        assert frame.source is not None
        source, given = frame.source, frame.given.get("attention_mask")
        shape = _shape(source)
        attended = None if outer is None else self._attended(source)
        if attended is not None and self.frames[attended] is not frame:
            frame.attending = True
            inherited = next((f.own for f in self.frames[-2:attended:-1] if f.attending), self.frames[attended].cross)
        mask = given if isinstance(given, Tensor) and given.ndim == 2 else None
        if mask is not None and shape is not None and mask.shape[0] == shape[0]:
            if mask.shape[1] > shape[1] and _owner(frame.module) is None:  # a cache of keys: earlier tokens too
                mask = mask[:, -shape[1] :]
            if outer is None or mask.shape == tuple(shape):
                keep = as_tokens(mask)
                assert keep is not None
                if inherited is not None and inherited.keep is not None and inherited.keep.shape == keep.shape:
                    keep = keep & inherited.keep.to(keep.device)  # tokens without labels stay out
                return Stream(shape[0], keep, _owner(frame.module))
        if outer is None:
            seen = as_tokens(given)
            one = self.rows_are_tokens and source.ndim == 2 and source.is_floating_point()
            return Stream(1 if one else len(source), seen, _owner(frame.module))
        if shape is None or frame.attending:
            return inherited
        read = READ in self._marks(source)
        for stream in [inherited, *(s for f in reversed(self.frames[:-1]) for s in f.streams)]:
            with contextlib.suppress(LookupError):
                if stream is not None and not (read and stream.sight):
                    return Stream(stream.batch, stream.over(shape), stream.owner, stream.sight)
        seen = as_tokens(given)  # of text and pictures in one row, say
        return None if seen is None or seen.shape != tuple(shape) else Stream(shape[0], seen)

    def _seen(self, frame: Frame, outer: Frame | None, sight: Tensor) -> Stream:
        """Of a module that is given pictures or sound."""
        mask = frame.given.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return Stream(len(sight), as_tokens(mask), _owner(frame.module))
        known = outer.encoder or outer.own if outer else None
        given = outer.given if outer else {}
        seen, read = (any(isinstance(given.get(key), Tensor) for key in keys) for keys in (SIGHT_AND_SOUND, TEXT))
        return known if known and seen and not read else Stream(len(sight))

    def _labels(self, frame: Frame) -> Tensor | None:
        labels = frame.given.get("labels")
        labels = self.labels if labels is None else labels
        return labels if isinstance(labels, Tensor) and labels.ndim == 2 else None

    def _chosen(self, frame: Frame, keep: Tensor | None, *, text: bool) -> Tensor | None:
        """A mask less the tokens that are not to count."""
        if self.tokens == "all" or not text:
            return keep
        if callable(self.tokens):
            found = self.tokens(frame.given | ({} if self.labels is None else {"labels": self.labels}))
            if not isinstance(found, Tensor) or found.ndim != 2:
                raise UserError("tokens: expected a function that returns a mask (batch, tokens)")
            chosen = found.bool()
        else:
            labels = self._labels(frame)
            if labels is None:
                raise UserError(f"tokens='labels': batch {self.batch} holds no labels of shape (batch, tokens)")
            chosen = labels != IGNORED
        if keep is not None and keep.shape != chosen.shape:
            raise UserError(f"tokens: a mask of {tuple(chosen.shape)} for tokens of {tuple(keep.shape)}")
        return chosen if keep is None else keep & chosen.to(keep.device)

    # Layers

    def _of_sequences(self, name: str, x: Tensor) -> Tokens:
        shape = (x.shape[0], x[0, ..., 0].numel() if len(x) else 0)
        if self._differ(x, shape):
            why = "fits two masks that differ, and was made of neither's tokens as far as one can see; all count"
            self.unknown.setdefault(name, f"its input of {shape[0]} x {shape[1]} tokens {why}")
            return self._tokens(None, shape, x)
        for stream in self._candidates(x):
            with contextlib.suppress(LookupError):
                keep = stream.over(shape)
                if shape[0] == shape[1] > 1:
                    self._doubt(name)  # samples or tokens first?
                return self._tokens(keep, shape, x)
        if self._padded():
            self.unknown.setdefault(name, f"its input of {shape[0]} x {shape[1]} tokens fits no mask; all count")
        batch = self.frames[0].own.batch if self.frames and self.frames[0].own else shape[0]
        if shape[0] > batch and shape[0] % batch == 0 and not self._padded():
            self._doubt(name)
            return Tokens(sample=batch)  # windows of pictures, say: each sample's stand together
        if shape[0] not in (1, batch):
            why = f"does not have the batch's {batch} samples first; all count, each of its {shape[0]} rows as a sample"
            self.unknown.setdefault(name, f"its input of {shape[0]} x {shape[1]} tokens {why}")
        return self._tokens(None, shape, x)

    def _tokens(self, keep: Tensor | None, shape: Sequence[int], x: Tensor) -> Tokens:
        if self.skip_first:
            whole = torch.ones(tuple(shape), dtype=torch.bool, device=x.device)
            keep = without_first(whole if keep is None else keep, self.skip_first)
        return Tokens(keep)

    def _flat(self, keep: Tensor) -> Tokens:
        """Tokens (B, T) as rows."""
        keep = without_first(keep, self.skip_first)
        sample = torch.arange(len(keep), device=keep.device)
        return Tokens(keep.flatten(), sample.repeat_interleave(keep.shape[1]))

    def _candidates(self, x: Tensor) -> Iterator[Stream]:
        """The streams that x may belong to, the likeliest first."""
        attended = self._attended(x)
        if attended is None:
            read = READ in self._marks(x)
            for frame in reversed(self.frames):
                yield from (stream for stream in frame.streams if not (read and stream.sight))
            return
        found = [*(f.own for f in self.frames[:attended:-1] if f.attending), self.frames[attended].cross]
        yield from (stream for stream in found if stream is not None)

    def _differ(self, x: Tensor, shape: Sequence[int]) -> bool:
        """Whether x fits both masks of a module that attends to other states, and its computation does not say which."""
        if self._provenance is None or any(mark != READ for mark in self._marks(x)):
            return False
        frame = next((f for f in reversed(self.frames) if f.cross_source is not None), None)
        if frame is None or frame.cross_source is None or x is frame.source or x is frame.cross_source:
            return False
        if frame.cross is None:
            return tuple(frame.cross_source.shape[:2]) == tuple(shape)
        fitting: list[Tensor] = []
        for stream in (frame.own, frame.cross):
            with contextlib.suppress(LookupError):
                keep = None if stream is None else stream.over(shape)
                fitting.append(torch.ones(tuple(shape), dtype=torch.bool) if keep is None else keep.cpu())
        return len(fitting) == 2 and not torch.equal(*fitting)

    def _doubt(self, name: str) -> None:
        own = self.frames[0].own if self.frames else None
        if own is None or own.batch > 1:
            self.doubts.setdefault(name, self.recall)

    def _padded(self) -> bool:
        return any(stream.padded for frame in self.frames for stream in frame.streams)

    def _of_rows(self, name: str, x: Tensor) -> Tokens:
        """Rows in one dimension: flattened tokens, those routed to an expert, or one per sample."""
        count = len(x)
        for frame in reversed(self.frames):
            found = self._copied(name, frame, x)
            if found is not None:
                return found
        latest = self.frames[-1].rows if self.frames else None
        if latest is not None and latest.count == count and _goes_on(latest.name, name, self.frames[-1].module):
            return latest.tokens
        for stream in self._candidates(x):
            if stream.batch == 1 and not stream.padded:
                return Tokens(sample=torch.zeros(count, dtype=torch.long, device=x.device))
            if stream.keep is not None and stream.keep.numel() == count and len(stream.keep) == stream.batch:
                self._doubt(name)
                return self._flat(stream.keep)
            if stream.keep is not None and int(stream.keep.sum()) == count:
                self._doubt(name)
                whole = self._flat(stream.keep)
                assert whole.keep is not None
                assert isinstance(whole.sample, Tensor)
                present = stream.keep.flatten()
                return Tokens(whole.keep[present], whole.sample[present])
        for frame in reversed(self.frames):
            if frame.source is not None and frame.source.ndim == 3 and frame.source[..., 0].numel() == count:
                self._doubt(name)
                return self._flat(torch.ones(frame.source.shape[:2], dtype=torch.bool))
        if any(stream.batch == count for stream in self._candidates(x)):
            self._doubt(name)
            return Tokens(sample=torch.arange(count, device=x.device))
        if self.frames and (self._padded() or self.frames[0].own is None or self.frames[0].own.batch > 1):
            why = "its rows are no tokens that can be told apart; all count, as one sample"
            self.unknown.setdefault(name, f"its input of {count} rows fits no sample or mask: {why}")
        return Tokens()

    def _copied(self, name: str, frame: Frame, x: Tensor) -> Tokens | None:
        """Rows that are all copies of tokens of a frame's input."""
        source = frame.source
        if source is None or source.ndim < 2 or source.shape[-1] != x.shape[-1] or source.dtype != x.dtype:
            return None
        if source is x and source.ndim == 2 and frame is self.frames[0]:
            if self.rows_are_tokens:
                return Tokens(sample=torch.zeros(len(x), dtype=torch.long, device=x.device))
            return Tokens(sample=torch.arange(len(x), device=x.device))
        before = dict(self.unknown), dict(self.doubts)
        if source.ndim == 2:
            if frame is self.frames[0]:
                return None
            with self.within(self.frames[: next(i for i, f in enumerate(self.frames) if f is frame)]):
                whole = self._of_rows(name, source)
            self.unknown = before[0]
        elif frame.own is None:
            return None
        else:
            shape = (source.shape[0], source[0, ..., 0].numel())
            try:
                keep = frame.own.over(shape)
            except LookupError:
                return None
            if keep is None:
                keep = torch.ones(shape, dtype=torch.bool, device=x.device)
            whole = self._flat(keep)
        index = None
        if isinstance(whole.sample, Tensor):
            index = matching_rows(x, source.reshape(-1, source.shape[-1]))
        if index is None or not isinstance(whole.sample, Tensor):
            self.doubts = before[1]
            return None
        keep = None if whole.keep is None else whole.keep.to(x.device)[index]
        return Tokens(keep, whole.sample.to(x.device)[index])


def _goes_on(before: str, name: str, module: nn.Module) -> bool:
    """Whether rows of the same number may go from one layer to the other: not from one expert to the next.

    Experts that are layers in lists of their own (``w1.0``, ``w2.0``, ``w1.1``) differ in their numbers; layers of one
    ``nn.Sequential`` do as well.
    """
    return isinstance(module, nn.Sequential) or _numbers_in(before) == _numbers_in(name)


def _numbers_in(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdecimal()]


def _above(name: str) -> Iterator[str]:
    while name:
        name = name.rpartition(".")[0]
        yield name


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's ``forward``."""
    kind: Any = type(module)
    return _arguments(kind)


@functools.cache
def _arguments(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _shape(source: Tensor) -> tuple[int, int] | None:
    """(B, T) of token numbers (B, T) or of embedded tokens (B, T, n); None for anything else."""
    fits = source.ndim == (3 if source.is_floating_point() else 2)
    return (source.shape[0], source.shape[1]) if fits else None


def _cross(frame: Frame, outer: Frame | None) -> Stream | None:
    """The stream of the tensor that a module attends to."""
    source = frame.cross_source
    assert source is not None
    given = frame.given.get("encoder_attention_mask")
    mask = as_tokens(given, square=False)
    if isinstance(given, Tensor) and given.ndim == 2 and source.ndim == 3 and given.shape == source.shape[:2]:
        return Stream(len(source), mask)
    for f in ([outer] if outer else []) + [frame]:
        for stream in (f.cross, f.encoder):
            if stream is not None and source.ndim == 3:
                with contextlib.suppress(LookupError):
                    return Stream(stream.batch, stream.over(source.shape[:2]))
    if mask is not None and source.ndim == 3 and mask.shape == source.shape[:2]:
        return Stream(len(source), mask)
    return Stream(len(source)) if mask is None else None


def _owner(module: nn.Module) -> Any:
    return module if hasattr(module, "_get_feat_extract_output_lengths") else None
