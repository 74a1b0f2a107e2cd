"""The solve phase against peft: from weights and covariances to the cropped factors of each layer, both on the CPU.

peft's part is ``collect_eigens_for_layer`` and the crop of ``preprocess_corda``, in fp32 as it always is; ours is
``factorize``, that is the whole of A and B, with one ``DampedCovariance`` for the layers that share an input (its
Cholesky factor is inside of the measured time). KPM solves in fp64. Each library gets the covariance as it keeps it itself:
ours sums in fp64, peft in fp32.

Rows of one kind of layer: square, tall (gate and up, of one input) and wide (down); first small ones on one thread, then
those of the Llama of the last rows, on all threads. Their activations are random with a correlated bulk and a few channels
of 30 times the strength, as language models have them. The last rows take a whole Llama with random weights, on the
statistics of random tokens: its spectra are flat, the hardest case of an iteration that looks for leading components; and,
where it is installed, SmolLM2-135M on Python's documentation, whose spectra are real (``--models smollm2`` takes it alone).
"""

import copy
from collections.abc import Callable, Sequence

import threadpoolctl
import torch
from corda import ContextStats, CordaInit, DampedCovariance, build_factors, collect_context, factorize
from corda.targets import linear
from end_to_end import LENGTH, PEERS, RANK, REAL, REAL_WINDOWS, asked, model_of, windows
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import collect_eigens_for_layer, crop_corda_eigens
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tenfold import bench

SEED = 233
REQUIRED = {"square": ">= 2", "tall": ">= 2.5", "wide": ">= 6"}
SMALL = [
    ("square", "query, key, value", 3, 768, 768),
    ("tall", "gate, up", 2, 1536, 512),
    ("wide", "down", 1, 512, 2048),
]
LARGE = [
    ("square", "output", 1, 1024, 1024),
    ("tall", "gate, up", 2, 2816, 1024),
    ("wide", "down", 1, 1024, 2816),
]
Found = list[tuple[Tensor, Tensor, Tensor]]
"""For each layer U (m, r), A (r, n) and B (m, r), with B A the adapted part of W."""


def activations(n: int, generator: torch.Generator) -> Tensor:
    """X (n, 16 n): low-rank signal, noise, a few strong channels."""
    signal = torch.randn(n, n // 8, generator=generator) @ torch.randn(n // 8, 16 * n, generator=generator)
    X = signal / (n // 8) ** 0.5 + 0.3 * torch.randn(n, 16 * n, generator=generator)
    X[torch.randperm(n, generator=generator)[: n // 128]] *= 30
    return X


def peft_layers(layers: dict[str, nn.Module], mode: str) -> Found:
    """What peft makes of layers that carry their covariance, with A and B as its ``corda_init`` forms them."""
    config = LoraConfig(r=RANK, corda_config=CordaConfig(corda_method=mode), target_modules=list(layers))
    found = []
    for layer in layers.values():
        layer.eigens = collect_eigens_for_layer(layer, config)
    crop_corda_eigens(_Named(layers), config)
    for layer in layers.values():
        U, S, V = layer.eigens.U_WC, layer.eigens.S_WC, layer.eigens.V_WC
        found.append((U, S.sqrt()[:, None] * V.T, U * S.sqrt()))
    return found


class _Named(nn.Module):
    """Layers under the names that peft looks for."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def prepared(layers: dict[str, nn.Module], covariances: dict[str, Tensor], mode: str) -> dict[str, nn.Module]:
    """Copies of layers with what peft keeps on them between its phases."""
    copies = {name: copy.deepcopy(layer) for name, layer in layers.items()}
    for name, layer in copies.items():
        layer.covariance_matrix, layer.corda_method, layer.rank = covariances[name], mode, RANK
    return copies


def agreement(layers: dict[str, nn.Module], covariances: dict[str, Tensor], mode: str) -> Callable[[Found, Found], str]:
    """Compares |U^T M|^2 of both with the optimum, that the singular values of M in fp64 give, summed over layers."""

    def check(ours: Found, peer: Found) -> str:
        best = found = theirs = 0.0
        gap = 0.0
        for (U, A, B), (V, A_peer, B_peer), (name, layer) in zip(ours, peer, layers.items(), strict=True):
            W, C = layer.weight.detach().double(), covariances[name].double()
            M = W @ C + 0.01 * C.diagonal().mean() * W
            sigma = torch.linalg.svdvals(M)
            chosen = sigma[:RANK] if mode == "ipm" else sigma[-RANK:]
            best += chosen.square().sum().item()
            found += (torch.linalg.qr(U.double()).Q.T @ M).square().sum().item()
            theirs += (torch.linalg.qr(V.double()).Q.T @ M).square().sum().item()
            gap = max(gap, ((B @ A - B_peer @ A_peer).norm() / (B @ A).norm()).item())
        more_is_better = 1 if mode == "ipm" else -1
        assert more_is_better * (found - theirs) >= -1e-6 * best, (found, theirs, best)
        return f"energy / optimum: ours {found / best:.6f}, peft {theirs / best:.6f}; B A differ by {gap:.1g}"

    return check


def group_rows(kind: str, names: str, count: int, m: int, n: int) -> list[bench.Comparison]:
    """One group of layers that share an input, in both modes."""
    generator = torch.Generator().manual_seed(SEED)
    X = activations(n, generator)
    C = X.double() @ X.T.double() / X.shape[1]
    layers: dict[str, nn.Module] = {}
    for i in range(count):
        layers[f"layer{i}"] = nn.Linear(n, m, bias=False)
        with torch.no_grad():
            layers[f"layer{i}"].weight.copy_(torch.randn(m, n, generator=generator) / n**0.5)
    covariances = dict.fromkeys(layers, C.float())

    def ours(mode: str) -> Found:
        init = CordaInit(mode=mode)
        shared = DampedCovariance(C, init.damping)
        factors = [factorize(layer.weight.detach(), shared, RANK, init) for layer in layers.values()]
        return [(f.left, f.A, f.B) for f in factors]

    rows = []
    for mode, required in (("ipm", ">= 10"), ("kpm", REQUIRED[kind])):
        peer = prepared(layers, covariances, mode)
        rows.append(
            bench.compare(
                f"{mode}_solve_{kind}_{m}x{n}_{torch.get_num_threads()}",
                lambda mode=mode: ours(mode),
                lambda peer=peer, mode=mode: peft_layers(peer, mode),
                agreement(layers, covariances, mode),
                shape=f"{names}: {f'{count} x ' if count > 1 else ''}{m}x{n}, r={RANK}, {_threads()}",
                required=required,
            )
        )
    return rows


def _threads() -> str:
    return "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"


def model_rows() -> list[bench.Comparison]:
    """All linear layers of a Llama with grouped-query attention, on the statistics of random tokens."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(512, (4, 512))} for _ in range(4)]
    return rows_of_a_model("model", "a 4-block Llama (1024, 2816)", model, data)


def real_rows() -> list[bench.Comparison]:
    """All linear layers of SmolLM2-135M, on the statistics of Python's documentation."""
    shape = f"SmolLM2-135M (576, 1536), {REAL_WINDOWS} x {LENGTH} tokens"
    return rows_of_a_model(REAL, shape, model_of(REAL), windows(REAL))


def rows_of_a_model(name: str, shape: str, model: nn.Module, data: list[dict[str, Tensor]]) -> list[bench.Comparison]:
    """Both modes for all linear layers but the head."""
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    stats: ContextStats = collect_context(model, data)
    layers = {name.replace(".", "_"): linear(model, name) for name in stats.groups}
    covariances = {name.replace(".", "_"): stats.covariance(name).float() for name in stats.groups}

    def ours(mode: str) -> Found:
        factors = build_factors(model, stats, lora, CordaInit(mode=mode)).factors
        return [(factors[name].left, factors[name].A, factors[name].B) for name in stats.groups]

    rows = []
    for mode, required in (("ipm", ">= 10"), ("kpm", ">= 2")):
        peer = prepared(layers, covariances, mode)
        rows.append(
            bench.compare(
                f"{mode}_solve_{name}",
                lambda mode=mode: ours(mode),
                lambda peer=peer, mode=mode: peft_layers(peer, mode),
                agreement(layers, covariances, mode),
                shape=f"{len(layers)} layers of {shape}, r={RANK}, {_threads()}",
                required=required,
                pairs=3,
                warm_up=0,
            )
        )
    return rows


def measure(models: Sequence[str]) -> list[bench.Comparison]:
    """Rows of single layers and of a Llama with random weights (``1024``), and of SmolLM2."""
    rows = []
    if "1024" in models:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        with threadpoolctl.threadpool_limits(1):
            rows += [row for group in SMALL for row in group_rows(*group)]
        torch.set_num_threads(threads)
        rows += [row for group in LARGE for row in group_rows(*group)] + model_rows()
    return rows + (real_rows() if REAL in models else [])


if __name__ == "__main__":
    chosen = asked(("1024",))
    raise SystemExit(bench.main("corda", PEERS, lambda: measure(chosen)))
