"""What the calibration text looks like to each layer: the second moment of its inputs, summed once per shared input.

C = sum_t w_t x_t x_t^T over the tokens t that count, "covariance" by custom although no mean is subtracted. The sums are
kept undamped and undivided, so they can be added over shards, tasks and ranks and serve every rank, mode, power and
damping.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corda.config import CordaInit
from corda.solvers import gram
from corda.targets import linear, linear_targets
from tenfold import NonFiniteError, UserError, checkpoints

CHUNK = 8192
"""Tokens of one fp32 product, before it is added to the fp64 sum."""
SCIPY_PAYS = 5e9
"""Multiplications of such a product from which on SciPy is worth leaving torch for."""
METHOD = "corda.context"

Batch = Mapping[str, Any] | Tensor
Data = Iterable[Batch] | Callable[[], object]


class TargetNotReachedError(UserError, RuntimeError):
    """A layer was targeted that the calibration never ran through."""


@dataclasses.dataclass
class _Sum:
    """The running sums of one input: C (n, n) in fp64, of which the lower triangle counts, tokens and samples."""

    moment: Tensor
    tokens: int = 0
    samples: int = 0
    calls: int = 0
    earlier: "_Sum | None" = None
    """Before the latest call; there until all layers that share the sum have got that call's input."""
    followers: dict[str, int] = dataclasses.field(default_factory=dict)
    """Layers that share the sum -> how many calls they share."""


@dataclasses.dataclass(frozen=True)
class ContextStats:
    """Second moments of the inputs of a model's layers, by group of layers that share an input.

    Attributes:
        moments: group -> C (n, n), fp64, undamped and not divided by any count.
        tokens: group -> number of tokens that counted.
        samples: group -> number of samples (rows) that held at least one of them.
        groups: target -> group.
        scale: what a sample weighs, as in ``CordaInit.scale``; baked into the moments where it is ``peft``.
        fingerprint: of the model that was calibrated.
    """

    moments: dict[str, Tensor]
    tokens: dict[str, int]
    samples: dict[str, int]
    groups: dict[str, str]
    scale: str
    fingerprint: str

    @property
    def targets(self) -> list[str]:
        """Names of the layers that these statistics cover."""
        return list(self.groups)

    def covariance(self, target: str) -> Tensor:
        """C of a layer, (n, n) fp64: the mean over samples (``peft``), over tokens (``token_mean``), or the plain sum.

        Raises:
            UserError: the layer was not calibrated.
        """
        group = self.group(target)
        count = {"peft": self.samples[group], "token_mean": self.tokens[group], "none": 1}[self.scale]
        return self.moments[group] / count

    def group(self, target: str) -> str:
        """The layer under whose name the statistics of ``target`` are kept, which all layers of one input share.

        Raises:
            UserError: the layer was not calibrated.
        """
        if target not in self.groups:
            raise UserError(f"no statistics of layer {target}; there are {len(self.groups)}, the first {self._first()}")
        return self.groups[target]

    def _first(self) -> str:
        return next(iter(self.groups), "none")

    def __add__(self, other: "ContextStats") -> "ContextStats":
        """Statistics of both data together. Layers share a sum in them that share one in both.

        Raises:
            UserError: of another model, other layers or another scale.
        """
        for name in ("fingerprint", "scale", "targets"):
            if getattr(self, name) != getattr(other, name):
                raise UserError(f"statistics of another {name.removesuffix('s')} cannot be added")
        pairs = {name: (self.groups[name], other.groups[name]) for name in self.groups}
        leaders: dict[tuple[str, str], str] = {}
        for name, pair in pairs.items():
            leaders.setdefault(pair, name)
        return dataclasses.replace(
            self,
            moments={name: self.moments[a] + other.moments[b] for (a, b), name in leaders.items()},
            tokens={name: self.tokens[a] + other.tokens[b] for (a, b), name in leaders.items()},
            samples={name: self.samples[a] + other.samples[b] for (a, b), name in leaders.items()},
            groups={name: leaders[pair] for name, pair in pairs.items()},
        )

    def check_model(self, model: nn.Module) -> None:
        """Raise ``UserError`` unless these statistics were collected on this model's weights."""
        if fingerprint(model) != self.fingerprint:
            raise UserError("the statistics were collected on another model (names, shapes or weights differ)")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with everything in it, whole or not at all."""
        from corda import __version__

        header = {name: getattr(self, name) for name in ("tokens", "samples", "groups", "scale", "fingerprint")}
        checkpoints.save(path, self.moments, method=METHOD, version=__version__, config=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ContextStats":
        """Read what ``save`` wrote; a ``UserError`` names a file that is something else."""
        checkpoint = checkpoints.load(path, method=METHOD)
        return cls(moments=checkpoint.tensors, **checkpoint.config)


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and a strided sample of the values of a model's weights.

    Adapter weights do not count, and peft's wrapping of names neither, so a model keeps its fingerprint when an adapter
    that leaves its weights alone is attached.
    """
    digest = hashlib.sha256()
    for name, value in sorted((_plain_name(name), value) for name, value in model.state_dict().items()):
        if ".lora_" in name or not isinstance(value, Tensor):
            continue
        flat = value.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        sample = flat[::step][:64].to("cpu", torch.float32)
        digest.update(json.dumps([name, list(value.shape), sample.tolist()]).encode())
    return digest.hexdigest()


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


class _Stop(Exception):
    """Raised inside a forward pass once the last input that is needed has been seen."""


class _Collector:
    """Forward pre-hooks that sum x x^T of each target's input, once for siblings that get the very same tensor."""

    def __init__(self, targets: Mapping[str, nn.Module], init: CordaInit, share: bool) -> None:
        self.targets = targets
        self.init = init
        self.share = share
        self.sums: dict[str, _Sum] = {}
        self.groups: dict[str, str] = {}
        self.mask: Tensor | None = None
        self.batch = -1
        self.may_stop = False
        self._calls: Counter[str] = Counter()  # in this batch
        # parent -> the last input below it: the object itself (an address would be reused), its version, and who got it
        self._latest: dict[str, tuple[weakref.ref[Tensor], int, str]] = {}

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self._observe(name, arguments[0] if arguments else keywords["input"])
            if self.may_stop and len(self._calls) == len(self.targets):
                raise _Stop

        return before

    def watch(self, model: nn.Module) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """A hook that takes number and mask of each forward pass of a model that somebody else runs."""
        parameters = list(inspect.signature(model.forward).parameters)
        number = itertools.count()

        def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            given = dict(zip(parameters, arguments, strict=False)) | keywords
            mask = given.get("attention_mask")
            tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
            self.batch = next(number)
            self.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
            if self.mask is not None and tokens is not None:  # with a cache of keys, the mask covers earlier tokens too
                self.mask = self.mask[:, -tokens.shape[1] :]

        return before

    def _observe(self, name: str, x: Tensor) -> None:
        self._calls[name] += 1
        parent = name.rpartition(".")[0]
        same, version, leader = self._latest.get(parent, (lambda: None, -1, ""))
        if self.share and same() is x and version == x._version and self._joins(name, leader):
            return
        if self.groups.setdefault(name, name) != name:
            self._part(name)
        self._latest[parent] = (weakref.ref(x), x._version, name)
        self._add(name, x)

    def _joins(self, name: str, leader: str) -> bool:
        """Whether the sum of ``leader``, whose latest input this one is, is that of ``name`` too."""
        shared = self.sums[leader]
        if name not in self.groups and shared.calls == 1:
            self.groups[name] = leader
            shared.followers[name] = 0
        if name == leader or self.groups.get(name) != leader or shared.followers[name] != shared.calls - 1:
            return False
        shared.followers[name] += 1
        if all(calls == shared.calls for calls in shared.followers.values()):
            shared.earlier = None
        return True

    def _part(self, name: str) -> None:
        """From now on ``name`` has a sum of its own, which starts with what it has shared so far."""
        shared = self.sums[self.groups[name]]
        calls = shared.followers.pop(name)
        source = shared if calls == shared.calls else shared.earlier
        assert source is not None
        self.sums[name] = dataclasses.replace(source, moment=source.moment.clone(), earlier=None, followers={})
        self.groups[name] = name

    def _part_absent(self, leader: str) -> None:
        """Part from ``leader`` the layers that did not get its latest input."""
        shared = self.sums[leader]
        for name in [name for name, calls in shared.followers.items() if calls < shared.calls]:
            self._part(name)
        shared.earlier = None

    def end_of_batch(self) -> None:
        """Once each target is known to be called once a pass, a pass can stop when all have been."""
        for leader in list(self.sums):
            self._part_absent(leader)
        if self.batch == 0:
            self.may_stop = self._calls == Counter(self.targets.keys())
        self._latest.clear()
        self._calls.clear()

    def _add(self, name: str, x: Tensor) -> None:
        rows, tokens, row_count = self._rows(name, x)
        if name not in self.sums:
            n = rows.shape[-1]
            self.sums[name] = _Sum(torch.zeros(n, n, dtype=torch.float64, device=x.device))
        else:
            self._part_absent(name)
        found = self.sums[name]
        if found.followers:
            found.earlier = dataclasses.replace(found, followers={})
            found.moment = found.moment.clone()
        for start in range(0, len(rows), CHUNK):
            product = _second_moment(rows[start : start + CHUNK])
            if not torch.isfinite(product.diagonal().sum()):
                raise NonFiniteError(f"layer {name}, batch {self.batch}: NaN or infinity in its input")
            found.moment += product
        found.tokens += tokens
        found.samples += row_count
        found.calls += 1

    def _rows(self, name: str, x: Tensor) -> tuple[Tensor, int, int]:
        """The tokens of x that count, (T, n) in at least fp32, weighted by their sample's scale; T; the number of samples."""
        x = x.detach()
        if x.ndim == 2:  # tokens of all rows in one dimension, as some models flatten them
            fits = self.mask is not None and self.mask.numel() == len(x)
            x = x.reshape(*self.mask.shape, -1) if fits and self.mask is not None else x[None]
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if self.mask is not None:
            if self.mask.shape != keep.shape:
                raise UserError(f"layer {name}: input of {tuple(keep.shape)} tokens, mask of {tuple(self.mask.shape)}")
            keep &= self.mask.to(x.device)
        if self.init.skip_first:  # per row, counted from its first token that is not padding
            keep &= keep.cumsum(dim=1) > self.init.skip_first
        samples = int(keep.any(dim=1).sum())
        rows = x[keep]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self.init.scale == "peft" and len(rows):
            top = torch.where(keep[..., None], x.float(), -torch.inf).amax(dim=(1, 2)).abs()
            if bool((top[keep.any(dim=1)] == 0).any()):
                raise UserError(
                    f"layer {name}, batch {self.batch}: a sample whose largest input is 0; use scale token_mean"
                )
            rows = rows / top[:, None].expand_as(keep)[keep][:, None]
        return rows, len(rows), samples


def _second_moment(rows: Tensor) -> Tensor:
    """``rows``^T ``rows``, of which at least the lower triangle is valid.

    SciPy does half of the work for it, but leaving torch in the middle of a forward pass costs some 20 ms, in which the
    idle threads of the one library keep those of the other waiting.
    """
    return gram(rows.T) if rows.numel() * rows.shape[1] > SCIPY_PAYS else rows.T @ rows


@contextlib.contextmanager
def _quiet_model(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; each module's own training flag afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():  # inference mode would hide the versions of tensors
            yield
    finally:
        for module in training:
            module.training = True


def collect_context(
    model: nn.Module,
    data: Data,
    targets: Sequence[str] | None = None,
    init: CordaInit | None = None,
    *,
    share: bool = True,
) -> ContextStats:
    """Run the calibration data through the model and sum up the second moment of each target's input.

    The model is left as it was: hooks are removed and training flags restored, also when a forward pass raises; no
    attribute stays on any module. Targets that get the very same tensor (q, k and v; gate and up) share one sum.

    Args:
        model: any module; called as ``model(**batch)``, or ``model(batch)`` for a tensor.
        data: batches (dicts with ``input_ids`` and, for padded rows, ``attention_mask``; or plain tensors), or a
            function without arguments that runs the model itself; the ``attention_mask`` of each of its passes counts.
        targets: full names of ``nn.Linear`` modules; default: all of them but the output head.
        init: ``scale`` and ``skip_first`` are used; default ``CordaInit()``.
        share: False sums up every target on its own; the same numbers, more time and memory.

    Returns:
        ``ContextStats``.

    Raises:
        UserError: no batch, no token after masking, or a target that is not a linear layer.
        TargetNotReachedError: a target that no batch ran through; the message lists them.
        NonFiniteError: NaN or infinity in a layer's input, with the layer's name and the batch's index.
    """
    init = init or CordaInit()
    names = linear_targets(model) if targets is None else list(targets)
    collector = _Collector({name: linear(model, name) for name in names}, init, share)
    hooks = [m.register_forward_pre_hook(collector.hook(n), with_kwargs=True) for n, m in collector.targets.items()]
    try:
        with _quiet_model(model):
            if isinstance(data, Iterable):
                for batch in data:
                    collector.batch += 1
                    _forward(model, batch, collector)
                    collector.end_of_batch()
            else:
                collector.batch = 0
                hooks.append(model.register_forward_pre_hook(collector.watch(model), with_kwargs=True))
                data()
                collector.end_of_batch()
    finally:
        for hook in hooks:
            hook.remove()
    if collector.batch < 0:
        raise UserError("the calibration data holds no batch")
    missed = [name for name in names if name not in collector.groups]
    if missed:
        raise TargetNotReachedError(f"never reached by the calibration data: {', '.join(missed)}")
    if any(found.tokens == 0 for found in collector.sums.values()):
        raise UserError("no token is left after masking (attention_mask, skip_first)")
    return ContextStats(
        moments={name: _whole(found.moment) for name, found in collector.sums.items()},
        tokens={name: found.tokens for name, found in collector.sums.items()},
        samples={name: found.samples for name, found in collector.sums.items()},
        groups={name: collector.groups[name] for name in names},
        scale=init.scale,
        fingerprint=fingerprint(model),
    )


def _whole(lower: Tensor) -> Tensor:
    """The symmetric matrix whose lower triangle is given."""
    return lower.tril() + lower.tril(-1).T


def _forward(model: nn.Module, batch: Batch, collector: _Collector) -> None:
    """One forward pass, as far as the last input that is needed."""
    with contextlib.suppress(_Stop):
        if isinstance(batch, Mapping):
            mask = batch.get("attention_mask")
            collector.mask = None if mask is None or mask.ndim != 2 else mask.bool()
            keywords = {key: value for key, value in batch.items() if key != "labels"}
            if hasattr(getattr(model, "config", None), "use_cache"):
                keywords["use_cache"] = False
            model(**keywords)
        else:
            collector.mask = None
            model(batch)
