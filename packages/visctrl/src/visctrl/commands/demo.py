"""`visctrl demo`: blobs of one material; is it carried into another picture, and do more rounds carry more?

A small denoiser made of diffusers' attention is trained, and goes through the same adapter, controller, banks and steppers as
Stable Diffusion. The ideal result is known. Matching mean and deviation of colors inside the masks (Reinhard) solves this
task outright, so its row stands beside ours: what is shown here is iteration, drift and control, not that the task is hard.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tenfold import checkpoints, executors
from tenfold.claims import Study, arm_rows
from tenfold.cli import Invocation
from tenfold.figures import Curve, Panel, image_grid, line_chart
from tenfold.report import write_report
from tenfold.terminal import show_claims, table, track
from visctrl import metrics
from visctrl.blobs import Pairs, render, render_pairs
from visctrl.commands import _film, _photos, _scene
from visctrl.config import DemoSettings, VisCtrlConfig
from visctrl.engine import VisCtrl
from visctrl.masks import to_pictures
from visctrl.outcome import EditOutput
from visctrl.toy import Arch, PatchCodec, Training, denoiser, toy_adapter, train_toy

DATA = "rendered discs and squares of one color on white, 32 x 32 pixels"
SEEDS = {"quick": 1, "default": 1, "full": 5}
LENGTHS = {"quick": (20, 1), "default": (2500, 24), "full": (2500, 48)}
"""Training steps and pairs."""
SLOWER = {"toy": 1, "unet": 4}
"""How many times as long a denoiser trains."""
ROUNDS = 4
CONFIG = VisCtrlConfig(steps=10, start=0.8, layers="0:", rounds=ROUNDS, refine=3, guard=False, max_bank="64MB")
ARMS: dict[str, dict[str, object]] = {
    "rounds": {},
    "plain inversion": {"refine": 1, "partial": False},
    "refined inversion": {"partial": False},
    "plain, only to the injected levels": {"refine": 1},
    "union": {"mode": "union", "bias": 2.0, "rounds": 3},
    "subject mask": {"mode": "subject", "lock": False, "rounds": 3},
    "40 steps": {"steps": 40, "rounds": 1},
    "10 steps": {"rounds": 1},
}
CURVES = {
    "refined, only to the injected levels (our default)": "rounds",
    "refined, to the noisiest level": "refined inversion",
    "plain, to the noisiest level (as released)": "plain inversion",
    "plain, only to the injected levels": "plain, only to the injected levels",
}
METHOD = "visctrl.toy"


def run(settings: DemoSettings, invocation: Invocation) -> int:
    """Train, edit, measure, decide, draw."""
    level = settings.level
    folder, seeds = invocation.folder, settings.seeds_of(SEEDS)
    sys.stdout.write(f"data: {DATA}\n")
    if settings.materials == "photos":
        _photos.check()
        sys.stdout.write("photographs: real, of scikit-image and scikit-learn; a picture without a claim\n")
    study = Study(folder, data=DATA, seeds=seeds, level=level)
    for seed in seeds:
        folder.own(f"models/seed-{seed}.safetensors", result=False)  # so that a run killed after a training is resumed
    with executors.make(settings.executor) as pool:
        here = invocation.quiet or pool is not None
        show = partial(track, description="models", quiet=here or len(seeds) == 1)
        study.over_seeds(partial(measure, str(folder.path), level, settings.arch, here or len(seeds) > 1), pool, show)
    _decide(study)
    _scene.decide(study, level)
    if level == "full":
        _film.decide(study)
    study.note(
        "Reinhard's matching of mean and deviation solves this world outright: it is here to show iteration and drift."
    )
    engine = draw(study, folder.path, level, settings.arch)
    more = _scene.draw(study, engine, CONFIG, level)
    if settings.materials == "photos":
        more |= _photos.draw(folder, level, seeds[0], CONFIG, settings.arch, quiet=invocation.quiet)
    summary = study.finish()
    captions = {
        "edits": "Targets, references, results after each round, the round that the drift guard returns, the ideal, and"
        " which place of the reference each part came from (red to the right, green downwards).",
        "rounds": "Material carried over and distance to the ideal, by round, with plain and with refined inversion.",
    }
    if level == "full":
        _film.draw(
            study, VisCtrl(toy_adapter(*model_of(str(folder.path), level, settings.arch, seeds[0], quiet=True)), CONFIG)
        )
        captions["video"] = (
            "Frames of a video: as they were, from one pool, with a random reference each, and the ideal."
        )
    write_report(folder, "visctrl demo: one material", captions | more)
    shown = ["transfer", "overlap", "rmse to ideal", *([_scene.RESIDUAL] if _scene.SCENES[level] else [])]
    sys.stdout.write(table(*arm_rows(study, list(study.arms), shown)) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


def model_of(work: str, level: str, arch: Arch, seed: int, quiet: bool) -> tuple[nn.Module, PatchCodec]:
    """The model of a seed, trained where it is not there yet."""
    file = Path(work) / f"models/seed-{seed}.safetensors"
    model, codec = denoiser(arch), PatchCodec()
    if file.is_file():
        found = checkpoints.load(file, method=METHOD).tensors
        for name, part in (("model", model), ("codec", codec)):
            own = {k.removeprefix(f"{name}."): x for k, x in found.items() if k.startswith(f"{name}.")}
            part.load_state_dict(own)
        return model.eval(), codec
    steps = LENGTHS[level][0] * SLOWER[arch]
    show = partial(track, description=f"training of seed {seed}", quiet=quiet)
    model, codec = train_toy(render(4096, seed).images, Training(steps=steps), seed, show, arch)
    tensors = {f"{n}.{k}": x for n, part in (("model", model), ("codec", codec)) for k, x in part.state_dict().items()}
    checkpoints.save(file, tensors, method=METHOD, config={"seed": seed, "steps": steps})
    return model, codec


def edits(engine: VisCtrl, pairs: Pairs, config: VisCtrlConfig, references: str = "reference") -> list[EditOutput]:
    """One edit per pair."""
    engine.config = config
    found = []
    source = getattr(pairs, references)
    for i in range(len(pairs.ideal)):
        reference = engine.reference(source.images[i : i + 1], mask=source.masks[i])
        mask = pairs.target.masks[i] if config.mode == "subject" else None
        found.append(
            engine.edit(pairs.target.images[i : i + 1], reference, mask=mask, history=True, provenance=config is CONFIG)
        )
    return found


def measure(work: str, level: str, arch: Arch, quiet: bool, seed: int) -> dict[str, dict[str, float]]:
    """Train one model, and measure all arms on its pairs."""
    model, codec = model_of(work, level, arch, seed, quiet)
    pairs = render_pairs(LENGTHS[level][1], seed)
    engine = VisCtrl(toy_adapter(model, codec), CONFIG)
    found = {"untouched": values(pairs.target.images, pairs), "reconstruction": {}, "Reinhard": {}}
    target, reference = pairs.target, pairs.reference
    matched = metrics.match_colors(target.images, reference.images, target.masks, reference.masks)
    found["Reinhard"] = values(matched, pairs)
    told = engine.conditions()
    for refine, name in ((1, "plain reconstruction"), (3, "reconstruction")):
        engine.config = dataclasses.replace(CONFIG, refine=refine)
        z = engine.encode(target.images)
        back = engine.denoise(engine.invert(target.images).latents[-1], told)
        own = values(engine.decode(back), pairs)
        found[name] = own | {"latent error": float((back - z).square().mean().sqrt())}
    for name, changes in ARMS.items():
        outs = edits(engine, pairs, dataclasses.replace(CONFIG, **changes) if changes else CONFIG)  # type: ignore[arg-type]
        if name in {"40 steps", "10 steps"}:
            found[name] = values(last(outs), pairs)
            continue
        for number in range(len(outs[0].history or [])):
            found[f"{name} {number + 1}"] = values(torch.cat([(o.history or [])[number] for o in outs]), pairs)
    found["guard"] = values(last(edits(engine, pairs, GUARDED)), pairs)
    once = dataclasses.replace(CONFIG, rounds=1)
    found["wrong reference"] = values(last(edits(engine, pairs, once, "wrong")), pairs)
    found["self reference"] = values(last(edits(engine, pairs, once, "target")), pairs)
    found |= _scene.measure(engine, CONFIG, level, seed)
    return found | (_film.measure(engine, seed) if level == "full" else {})


GUARDED = dataclasses.replace(CONFIG, guard=True)


def last(outs: list[EditOutput]) -> Tensor:
    """The results of edits as one batch."""
    return torch.cat([out.images for out in outs])


def values(images: Tensor, pairs: Pairs) -> dict[str, float]:
    """Medians of the transfer and means of overlap and distance to the ideal; clipped as they would be shown."""
    x, target = images.float().clamp(-1, 1), pairs.target
    return {
        "transfer": float(metrics.transfer(x, target.images, pairs.ideal, target.masks).median()),
        "overlap": float(metrics.overlap(x, target.masks).mean()),
        "rmse to ideal": float(metrics.rmse(x, pairs.ideal).mean()),
    }


def _decide(study: Study) -> None:
    t, r, o = "transfer", "rmse to ideal", "overlap"
    study.difference(
        "rounds", "transfer after 3 rounds - after 1", ("rounds 3", t), ("rounds 1", t), required=">= 0.1", main=True
    )
    study.ratio(
        "ideal",
        "RMSE to the ideal at the round of the drift guard / of the untouched target",
        ("guard", r),
        ("untouched", r),
        required="<= 0.75",
        main=True,
    )
    study.difference(
        "right_reference",
        "transfer after one round, right - wrong reference",
        ("rounds 1", t),
        ("wrong reference", t),
        required=">= 0.1",
    )
    for sign, bound in (("low", ">= -0.1"), ("high", "<= 0.1")):
        study.difference(
            f"self_reference_{sign}",
            "transfer, self reference - reconstruction",
            ("self reference", t),
            ("reconstruction", t),
            required=bound,
        )
    study.ratio(
        "drift",
        "RMSE to the ideal after four rounds, plain / refined inversion, both to the noisiest level",
        ("plain inversion 4", r),
        ("refined inversion 4", r),
        required=">= 1.3",
    )
    study.ratio(
        "inversion",
        "error of the reconstructed latents, refined / plain inversion",
        ("reconstruction", "latent error"),
        ("plain reconstruction", "latent error"),
        required="<= 0.5",
    )
    study.ratio(
        "structure",
        "overlap with the target's shapes at the guard's round / untouched",
        ("guard", o),
        ("untouched", o),
        required=">= 0.8",
    )
    study.ratio("few_steps", "transfer with 10 steps / with 40", ("10 steps", t), ("40 steps", t), required=">= 0.8")


def draw(study: Study, work: Path, level: str, arch: Arch) -> VisCtrl:
    """Draw the edits of the first seed, and the curves over rounds; returns the seed's engine."""
    seed = study.seeds[0]
    model, codec = model_of(str(work), level, arch, seed, quiet=True)
    pairs = render_pairs(min(8, LENGTHS[level][1]), seed)
    engine = VisCtrl(toy_adapter(model, codec), CONFIG)
    outs, kept = edits(engine, pairs, CONFIG), edits(engine, pairs, GUARDED)
    rows = {"target": pairs.target.images, "reference": pairs.reference.images}
    rows |= {f"round {i + 1}": torch.cat([(o.history or [])[i] for o in outs]) for i in range(ROUNDS)}
    rows |= {"guard": last(kept), "ideal": pairs.ideal}
    shown = [to_pictures(images, 32, 32) for images in rows.values()]
    maps = [(o.provenance or [np.full((8, 8, 3), 255, np.uint8)])[0].repeat(4, axis=0).repeat(4, axis=1) for o in outs]
    image_grid(study.run.figure("edits"), [*shown, maps], row_titles=[*rows, "came from"], cell=0.9)
    x = list(range(1, ROUNDS + 1))

    def curves(metric: str) -> dict[str, Curve]:
        return {
            label: Curve(x, [float(study.values((f"{arm} {i}", metric)).mean()) for i in x])
            for label, arm in CURVES.items()
        }

    panels = [Panel(metric, "rounds", metric, curves(metric)) for metric in ("transfer", "rmse to ideal")]
    line_chart(study.run.figure("rounds"), panels)
    return engine
