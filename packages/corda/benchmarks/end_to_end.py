"""From a base model and calibration text to a wrapped model, against peft: time in turn, memory in processes of their own.

Both run the same windows one at a time (peft takes no batches), with the same threads and in fp32, on Llamas with
grouped-query attention and random weights. Time is that of ``collect_context`` (peft: its calibration) and of the whole
way (peft: ``preprocess_corda`` and ``get_peft_model``), each with one copy of the model in it. Memory is the peak resident
size of a process that goes the whole way once, less that of one that imports the same and makes model and windows only.

The last rows show the error of the adapted subspace. The reference is an SVD in fp64 of W C_d, C summed in fp64.
"""

import copy
import importlib.metadata
import resource
import subprocess
import sys
from collections.abc import Callable

import peft
import torch
from corda import CordaInit, apply_corda, collect_context, get_corda_model, stream_factors
from corda.attach import lora_layers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import calib_cov_distribution, preprocess_corda
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tenfold import bench
from tenfold.claims import Bound

RANK = 16
WINDOWS, LENGTH = 16, 512
MODELS = {
    "1024": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8},
    "768": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12},
}
"""Llamas by width."""
KV_HEADS = {"1024": 2, "768": 4}
WAYS = ("peft", "corda", "corda-streamed")


def model_of(width: str) -> LlamaForCausalLM:
    """The Llama of that width, with random weights."""
    torch.manual_seed(233)
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=KV_HEADS[width], **MODELS[width])).eval()


def windows() -> list[dict[str, Tensor]]:
    """Random tokens, a window a batch."""
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(512, (1, LENGTH))} for _ in range(WINDOWS)]


def lora(mode: str | None = None) -> LoraConfig:
    """All linear layers but the output head; with peft's own CorDA in that mode."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, task_type="CAUSAL_LM")
    if mode:
        config.init_lora_weights, config.corda_config = "corda", CordaConfig(corda_method=mode)
    return config


def run(model: LlamaForCausalLM, data: list[dict[str, Tensor]]) -> None:
    """What peft calls to calibrate."""
    with torch.no_grad():
        for batch in data:
            model(**batch)


def whole(way: str, mode: str, model: LlamaForCausalLM, data: list[dict[str, Tensor]]) -> peft.PeftModel:
    """The wrapped model; ``model`` is changed."""
    if way == "peft":
        config = lora(mode)
        preprocess_corda(model, config, run_model=lambda: run(model, data))
        return get_peft_model(model, config)
    init = CordaInit(mode=mode)
    if way == "corda":
        return get_corda_model(model, lora(), data, init)
    return apply_corda(model, stream_factors(model, data, lora(), init), lora())


def products(wrapped: peft.PeftModel) -> dict[str, Tensor]:
    """B A of each layer."""
    return {
        name: (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        for name, layer in lora_layers(wrapped).items()
    }


def time_rows(width: str) -> list[bench.Comparison]:
    """Statistics and the whole way."""
    model, data = model_of(width), windows()

    def peft_statistics() -> dict[str, Tensor]:
        twin, config = copy.deepcopy(model), lora("kpm")
        calib_cov_distribution(twin, config, lambda: run(twin, data), None, None)
        return {name: m.covariance_matrix for name, m in twin.named_modules() if hasattr(m, "covariance_matrix")}

    def our_statistics() -> object:
        return collect_context(copy.deepcopy(model), data)

    def same_covariance(ours: object, peer: dict[str, Tensor]) -> str:
        worst = 0.0
        for name, theirs in peer.items():
            gap = (ours.covariance(name) - theirs).norm() / theirs.norm()  # type: ignore[attr-defined]
            worst = max(worst, gap.item())
        assert worst < 1e-4, worst
        return f"C differ by {worst:.0e}"

    shape = _shape(width)
    rows = [
        bench.compare(
            f"statistics_{width}",
            our_statistics,
            peft_statistics,
            same_covariance,
            shape=shape,
            required=">= 1.5",
            pairs=5,
        )
    ]
    for mode, required in (("ipm", ">= 2"), ("kpm", ">= 1.5")):
        for way in WAYS[1:]:
            rows.append(
                bench.compare(
                    f"{way}_{mode}_{width}",
                    _timed(way, mode, model, data),
                    _timed("peft", mode, model, data),
                    _same_products,
                    shape=shape,
                    required=required,
                    pairs=3,
                    warm_up=0,
                )
            )
    return rows


def _timed(way: str, mode: str, model: LlamaForCausalLM, data: list[dict[str, Tensor]]) -> Callable[[], peft.PeftModel]:
    return lambda: whole(way, mode, copy.deepcopy(model), data)


def _same_products(ours: peft.PeftModel, peer: peft.PeftModel) -> str:
    mine, theirs = products(ours), products(peer)
    gaps = torch.tensor([((mine[name] - theirs[name]).norm() / mine[name].norm()).item() for name in mine])
    return f"B A differ by {gaps.median():.0e} (median layer), {gaps.max():.0e} (worst)"


def _shape(width: str) -> str:
    m = MODELS[width]
    heads = f"{m['num_attention_heads']}/{KV_HEADS[width]} heads"
    return (
        f"{m['num_hidden_layers']} blocks ({m['hidden_size']}, {m['intermediate_size']}, {heads}), "
        f"{WINDOWS} x {LENGTH} tokens, r={RANK}, {torch.get_num_threads()} threads"
    )


def memory_rows(width: str) -> list[bench.Comparison]:
    """Extra peak memory of the whole way."""
    rows = []
    idle = _peak("nothing", "kpm", width)
    for mode in ("ipm", "kpm"):
        theirs = _peak("peft", mode, width) - idle
        for way, required in (("corda", ">= 4"), ("corda-streamed", ">= 10")):
            ours = _peak(way, mode, width) - idle
            rows.append(
                bench.Comparison(
                    id=f"memory_{way}_{mode}_{width}",
                    shape=_shape(width),
                    ours=ours,
                    peer=theirs,
                    unit="MB",
                    statistic="peak resident size of a process each, less one that makes the model only",
                    ratio=theirs / ours,
                    ci95=None,
                    required=required,
                    holds=Bound.parse(required).decide(theirs / ours, None),
                    equal="the computation of the time rows",
                )
            )
    return rows


def _peak(way: str, mode: str, width: str) -> float:
    """MB of a process of its own."""
    command = [sys.executable, __file__, "--peak", way, mode, width]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    return float(done.stdout.split()[-1])


def peak(way: str, mode: str, width: str) -> None:
    """Go one way and print this process's peak."""
    model, data = model_of(width), windows()
    if way != "nothing":
        whole(way, mode, model, data)
    sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}\n")


def error_rows(width: str) -> list[bench.Comparison]:
    """How far the adapted subspaces are from those of an SVD in fp64: mean of 1 - cos^2 over all layers and directions."""
    rows = []
    model, data = model_of(width), windows()
    double = collect_context(copy.deepcopy(model).double(), data)
    for mode in ("ipm", "kpm"):
        wrapped = {way: whole(way, mode, copy.deepcopy(model), data) for way in ("corda", "peft")}
        lost = dict.fromkeys(wrapped, 0.0)
        bases = {way: lora_layers(model) for way, model in wrapped.items()}
        for name in double.targets:
            W, C = model.get_submodule(name).weight.detach().double(), double.covariance(name)
            M = W @ C + 0.01 * C.diagonal().mean() * W
            U = torch.linalg.svd(M, full_matrices=False).U
            U = U[:, :RANK] if mode == "ipm" else U[:, -RANK:]
            for way, layers in bases.items():
                Q = torch.linalg.qr(layers[name].lora_B["default"].weight.detach().double()).Q
                lost[way] += (1 - (U.T @ Q).square().sum() / RANK).item() / len(double.targets)
        ratio = lost["peft"] / max(lost["corda"], 1e-16)
        rows.append(
            bench.Comparison(
                id=f"subspace_error_{mode}_{width}",
                shape=_shape(width),
                ours=lost["corda"],
                peer=lost["peft"],
                unit="",
                statistic="mean of 1 - cos^2 to the subspace of an SVD in fp64",
                ratio=ratio,
                ci95=None,
                required=">= 1",
                holds=ratio >= 1,
                equal="B of both, orthonormalised",
            )
        )
    return rows


def measure() -> list[bench.Comparison]:
    """All rows."""
    rows = [row for width in MODELS for row in (*memory_rows(width), *time_rows(width))]
    return rows + error_rows("1024")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        peak(*sys.argv[2:])
    else:
        peers = {"peft": peft.__version__, "torch": importlib.metadata.version("torch")}
        raise SystemExit(bench.main("corda", peers, measure))
