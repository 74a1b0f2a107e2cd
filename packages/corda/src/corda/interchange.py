"""CorDA as peft spells it: ``preprocess_corda`` in place of peft's own, and the two files that it reads and writes.

peft initializes in two steps: ``preprocess_corda`` leaves singular vectors on each target, from which ``get_peft_model``
with ``init_lora_weights="corda"`` makes A, B and the residual. Here the first step is ours, with our statistics and our
solvers; the second one remains peft's. A training script changes only its import.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import numpy as np
import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from corda.collecting import collect_context
from corda.config import MODES, CordaInit
from corda.context import ContextStats
from corda.factors import FactorSet, build_factors
from corda.fingerprints import fingerprint
from corda.targets import Target, resolve_targets, weight_of, writable_weights
from tenfold import UserError, checkpoints
from tenfold.errors import MissingExtraError, did_you_mean
from tenfold.files import replacing

if TYPE_CHECKING:
    from peft import LoraConfig

KNOWS_CONV1D = (0, 19)
"""First version of peft whose ``corda_init`` knows Conv1D; earlier ones leave a wrong residual where the layer is square."""

FilePath = str | os.PathLike[str]


class _Eigens(NamedTuple):
    """What peft's ``corda_init`` expects on a layer: Sigma_S (r,), U_S (m, r) and W^T U_S Sigma_S^-1 (n, r)."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def preprocess_corda(
    model: nn.Module,
    lora_config: "LoraConfig",
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Prepare a model for ``get_peft_model`` with ``init_lora_weights="corda"``; replaces peft's function of this name.

        S_WC = Sigma_S,  U_WC = U_S,  V_WC = W^T U_S Sigma_S^-1        as ``eigens`` of each targeted layer
        peft then takes  B = U_WC sqrt(S_WC / s),  A = sqrt(S_WC / s) V_WC^T,  so that s B A = U_S U_S^T W

    Samples may come in batches and padded: each row is a sample of its own, and tokens that the forward pass's
    ``attention_mask`` leaves out do not count; an input of two dimensions is one sample, as in peft. Training flags and
    hooks are restored, and no attribute but ``eigens`` is left, also when ``run_model`` raises.

    Of ``lora_config.corda_config``, ``corda_method``, ``cache_file`` (the eigens) and ``covariance_file`` are used: each
    file is read if it exists and is not empty, the cache first, and otherwise written, whole or not at all. ``verbose``,
    and ``use_float16_for_covariance`` (the sums are fp64, the file fp32) have no effect. ``prune_temporary_fields=False``
    leaves what peft leaves: ``covariance_matrix`` (fp32, the layers of one input share it), ``sample_count`` (where it was
    counted here), ``corda_method`` and ``rank``.

    Args:
        model: the plain base model.
        lora_config: the configuration that ``get_peft_model`` gets next; targets, ranks and patterns as there, including
            ``"all-linear"`` and the model's default targets.
        run_model: function that runs the calibration samples through the model; not called where a file makes it
            unnecessary.
        hooked_model: the model that ``run_model`` runs, if it is another one with layers of the same names.

    Raises:
        UserError: no ``corda_config``, no ``run_model`` where it is needed, a file that is not peft's or of other layers
            or ranks, a rank above its layer's size, or a layer that is not a linear one with a weight of its own.
        UnsupportedLayerError: a quantized layer: what peft does next replaces its weight.
        TargetNotReachedError: a target that ``run_model`` never ran through; the message names it.
        NonFiniteError: NaN or infinity in a layer's input or weight, with the layer's name.
        MissingExtraError: peft's module for CorDA needs attrs, which peft itself does not install.
    """
    eigens_of_peft = _type_of_peft()
    settings = lora_config.corda_config
    if settings is None:
        raise UserError("lora_config has no corda_config; expected LoraConfig(corda_config=CordaConfig(...))")
    targets = resolve_targets(model, lora_config)
    version = tuple(map(int, peft.__version__.split(".")[:2]))
    writable_weights(model, targets)
    for name in targets:
        if isinstance(model.get_submodule(name), Conv1D) and version < KNOWS_CONV1D:
            raise UserError(
                f"layer {name} is a Conv1D, which peft {peft.__version__} cannot start: update it, or use apply_corda"
            )
    if _filled(settings.cache_file):
        eigens = _read_cache(settings.cache_file, model, targets)
    else:
        if settings.corda_method not in MODES:
            hint = did_you_mean(str(settings.corda_method), MODES)
            raise UserError(f"unknown corda_method '{settings.corda_method}' in corda_config: {hint}")
        init = CordaInit(mode=settings.corda_method)
        if _filled(settings.covariance_file):
            stats = stats_from_peft(settings.covariance_file, model, lora_config)
        else:
            if run_model is None:
                raise UserError("run_model is missing, and neither cache_file nor covariance_file exists yet")
            kept = settings.covariance_file is not None or not settings.prune_temporary_fields
            how: Any = {"reusable": kept, "rows_are_tokens": True}
            stats = collect_context(hooked_model or model, run_model, list(targets), init, **how)
            stats = dataclasses.replace(stats, fingerprint=fingerprint(model))
            if settings.covariance_file is not None:
                stats_to_peft(stats, settings.covariance_file)
        try:
            eigens = _eigens(build_factors(model, stats, lora_config, init))
        except np.linalg.LinAlgError as error:  # rounding to fp16 costs more than the damping makes up for
            raise UserError(
                f"a covariance in {settings.covariance_file} is not positive definite, even damped"
            ) from error
        if settings.cache_file is not None:
            _write_cache(eigens, settings.cache_file)
        if not settings.prune_temporary_fields:
            _leave_fields(model, stats, targets, settings.corda_method)
    for name, found in eigens.items():
        layer: Any = model.get_submodule(name)
        layer.eigens = eigens_of_peft(**found._asdict())


def _leave_fields(model: nn.Module, stats: ContextStats, targets: Mapping[str, Target], method: str) -> None:
    """Leave on each layer the fields that peft's function leaves when it is told not to prune them."""
    shared = {group: stats.covariance(group).float() for group in stats.moments}
    for name, target in targets.items():
        layer: Any = model.get_submodule(name)
        layer.covariance_matrix = shared[stats.group(name)]
        layer.corda_method, layer.rank = method, target.rank
        if stats.scale == "peft":
            layer.sample_count = stats.samples[stats.group(name)]


def stats_from_peft(path: FilePath, model: nn.Module, lora_config: "LoraConfig") -> ContextStats:
    """Read a ``covariance_file``, peft's or ours, as statistics of the layers that ``lora_config`` targets.

    Such a file holds means of an unknown number of samples: the counts are 0 and the scale is ``none``, so the outcome
    cannot be added to statistics that are means of known numbers. It does not say which model it belongs to either: only
    shapes are checked. Layers of one parent with equal covariances are taken to share an input.

    Args:
        path: the file.
        model: the plain base model.
        lora_config: its targets are read.

    Raises:
        UserError: not such a file, a target that is missing in it, or a covariance that does not fit its layer.
    """
    targets = resolve_targets(model, lora_config)
    found = checkpoints.read_foreign(path, option="covariance_file", names=targets.keys()).tensors
    moments: dict[str, Tensor] = {}
    groups: dict[str, str] = {}
    for name in targets:
        weight = weight_of(model, name)
        n = weight.shape[1]
        covariance = _entry(found, name, path)
        if covariance.shape != (n, n):
            raise UserError(f"{path}: covariance of layer {name} is {_by(covariance)}, expected {n} x {n}")
        parent = name.rpartition(".")[0]
        siblings = [other for other in moments if other.rpartition(".")[0] == parent]
        same = (other for other in siblings if torch.equal(found[other], covariance))
        groups[name] = next(same, name)
        if groups[name] == name:
            moments[name] = covariance.to(weight.device, torch.float64)
    none = dict.fromkeys(moments, 0)
    return ContextStats(moments, none, dict(none), groups, scale="none", fingerprint=fingerprint(model))


def stats_to_peft(stats: ContextStats, path: FilePath) -> None:
    """Write the covariance of each layer in fp32 as a ``covariance_file``, where layers of one input share it too.

    Raises:
        UserError: cross moments, which hold no covariance.
    """
    shared = {group: stats.covariance(group).float().cpu() for group in stats.moments}
    _write({name: shared[group] for name, group in stats.groups.items()}, path)


def _type_of_peft() -> Any:
    """``CordaEigens``, imported late: its module imports attrs, which peft does not install."""
    try:
        from peft.tuners.lora.corda import CordaEigens
    except ModuleNotFoundError as error:
        if error.name != "attr":
            raise
        raise MissingExtraError(
            "peft's corda module needs attrs, which peft does not bring: pip install attrs"
        ) from error
    return CordaEigens


def _eigens(factors: FactorSet) -> dict[str, _Eigens]:
    """V = W^T U Sigma^-1, from A = sqrt(1 / (s Sigma)) U^T W; zero in directions without any weight."""
    eigens = {}
    for name, found in factors.factors.items():
        root = torch.where(found.sigma > 0, (factors.targets[name].scaling / found.sigma).sqrt(), 0.0)
        eigens[name] = _Eigens(found.sigma, found.left.contiguous(), (found.A.T * root).contiguous())
    return eigens


def _write_cache(eigens: Mapping[str, _Eigens], path: FilePath) -> None:
    _write({f"{name}.eigens.{key}": t for name, found in eigens.items() for key, t in found._asdict().items()}, path)


def _read_cache(path: FilePath, model: nn.Module, targets: Mapping[str, Target]) -> dict[str, _Eigens]:
    names = [f"{name}.eigens.{key}" for name in targets for key in _Eigens._fields]
    cache = checkpoints.read_foreign(path, option="cache_file", names=names).tensors
    eigens = {}
    for name, target in targets.items():
        weight = weight_of(model, name)
        (m, n), r = weight.shape, target.rank
        parts = [_entry(cache, f"{name}.eigens.{key}", path) for key in _Eigens._fields]
        for part, key, shape in zip(parts, _Eigens._fields, [(r,), (m, r), (n, r)], strict=True):
            if part.shape != shape:
                wanted = " x ".join(map(str, shape))
                raise UserError(f"{path}: {key} of layer {name} is {_by(part)}, expected {wanted} for rank {r}")
        eigens[name] = _Eigens(*(part.to(weight.device) for part in parts))
    return eigens


def _filled(path: FilePath | None) -> TypeGuard[FilePath]:
    """Whether there is a file to be read; an empty one, as ``mktemp`` makes it, is to be written."""
    return path is not None and Path(path).is_file() and Path(path).stat().st_size > 0


def _write(tensors: Mapping[str, Tensor], path: FilePath) -> None:
    with replacing(path) as temporary:
        torch.save(dict(tensors), temporary)


def _entry(found: Mapping[str, Tensor], key: str, path: FilePath) -> Tensor:
    if key not in found:
        raise UserError(f"{path}: no entry {key}: {did_you_mean(key, found)}")
    return found[key]


def _by(tensor: Tensor) -> str:
    return " x ".join(str(size) for size in tensor.shape)
