"""`mamba-fscil add-class`: a new class from a folder of pictures, and what the old ones lose by it."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_fscil.commands._files import decoded, learner_of, pictures_in, refuse_twice, test_part
from mamba_fscil.config import AddClassSettings, DataSettings
from mamba_fscil.data import Part, load_tests, read_maps
from mamba_fscil.training.learner import IncrementalLearner
from mamba_fscil.training.store import append, copy, missing_in, opened
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.terminal import table, track


def run(settings: AddClassSettings, invocation: Invocation) -> None:
    """Check everything, learn, write the learner's next file whole, and print what changed."""
    learner = learner_of(settings.learner, settings.device)
    stored = learner.stored
    assert stored is not None
    if settings.save_as is None and not stored.latest:
        raise UserError(
            f"--learner {settings.learner} is an older file of its learner: --save_as NEW goes on from it in a new folder"
        )
    if settings.save_as is not None and Path(settings.save_as).resolve() == stored.folder.resolve():
        raise UserError(f"--save_as {settings.save_as} is the learner itself: leave it out, or give another folder")
    inputs, names, skipped = _pictures(learner, settings)
    learner.check_names(names, update=settings.update)
    tested = None if settings.data is None else _tests(learner, settings.data, names)
    target = settings.save_as or stored.folder
    with opened(target, writing=True, option="--save_as" if settings.save_as else "--learner") as growing:
        if settings.save_as is not None:
            missing_in(stored.folder, growing, stored.number)
        elif len(growing.entries) != stored.number:
            raise UserError(f"--learner {settings.learner}: another command has changed it meanwhile: try again")
    maps = torch.cat([learner.maps(part) for part in torch.split(inputs, 64)])
    before = _answers(learner, tested)
    show = partial(track, description="learning", quiet=invocation.quiet)
    old_classes = list(learner.classes)
    learner.learn_session(maps, names, update=settings.update, steps=settings.steps, seed=settings.seed, show=show)
    if settings.save_as is not None:
        copy(stored.folder, settings.save_as, stored.number)
    with opened(target, writing=True) as growing:
        written = append(growing, learner, option="--save_as" if settings.save_as else "--learner")
    after = _answers(learner, tested, (maps, torch.tensor([learner.classes.index(name) for name in names])))
    found = _report(learner, maps, names, before, after, tested, old_classes)
    found["skipped"] = skipped
    invocation.folder.write_json("added.json", {**found, "file": str(written), "bytes": written.stat().st_size})
    on = "test pictures" if tested is not None else "class means and the pictures just learned (better: --data)"
    sys.stdout.write(f"measured on {on}\n{table(['', 'before', 'after'], found['table'])}\n")
    if found["lost"]:
        sys.stdout.write("\n" + table(["old class", "before (%)", "after (%)"], found["lost"]) + "\n")
    sys.stdout.write("\n" + table(["new class", "nearest other class", "pictures"], found["alike"]) + "\n")
    if found["wrong"]:
        sys.stdout.write("\n" + table(["new class", "mistaken for", "pictures"], found["wrong"]) + "\n")
    sys.stdout.write("".join(f"\n{line}\n" for line in found["warnings"]))
    for line in skipped:
        sys.stdout.write(f"left out: {line}\n")
    size = written.stat().st_size / 1e6
    room = learner.capacity - len(learner.classes)
    sys.stdout.write(f"\n{written}: {size:.2f} MB; {len(learner.classes)} classes, room for {room} more\n")


def _pictures(learner: IncrementalLearner, settings: AddClassSettings) -> tuple[Tensor, list[str], list[str]]:
    """Images or maps, the class of each, and what is wrong with files that were left out."""
    path = Path(settings.images).expanduser()
    if path.suffix == ".npz" and path.is_file():
        if settings.name is None:
            raise UserError("--name is missing: an npz file of maps holds one class")
        maps = read_maps(path)
        _enough(len(maps), settings, settings.name)
        return maps, [settings.name] * len(maps), []
    if learner.backbone is None:
        raise UserError(f"--images {path}: this learner was made from maps: give an npz file of maps")
    if settings.name is not None or not path.is_dir():
        folders = {settings.name or "": path}
    else:
        folders = {p.name: p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")}
        if not folders:
            raise UserError(f"--name is missing: {path} holds no folders whose names the classes could take")
    images, files, names, faults = [], [], [], []
    for name, folder in folders.items():
        found, kept, bad = decoded(pictures_in(folder, "--images"), learner.size, skip_bad=settings.skip_bad)
        _enough(len(kept), settings, str(folder))
        images.append(found)
        files += kept
        names += [name] * len(kept)
        faults += bad
    refuse_twice(torch.cat(images), files)
    return torch.cat(images), names, faults


def _enough(count: int, settings: AddClassSettings, where: str) -> None:
    if settings.shots is not None and count < settings.shots:
        raise UserError(f"{where}: {count} pictures, --shots asks for {settings.shots}")


def _tests(learner: IncrementalLearner, source: str, names: list[str]) -> Part:
    """Test pictures of old and new classes, with the labels that they will have."""
    grown = IncrementalLearner()
    grown.classes = [*learner.classes, *(n for n in dict.fromkeys(names) if n not in learner.classes)]
    grown.size = learner.size
    reading = DataSettings(size=learner.size) if source.startswith("imagefolder:") else DataSettings()
    return test_part(grown, load_tests(source, reading=reading, plain=True), source)[0]


def _answers(
    learner: IncrementalLearner, tested: Part | None, learned: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Guessed and true classes: of test pictures; without any, of the mean map of each class, and the maps just learned."""
    if tested is None:
        own = torch.empty(0, dtype=torch.int64) if learned is None else learned[1]
        kept = [k for k in range(len(learner.classes)) if k not in set(own.tolist())]
        parts = [learner.memory.means(kept).to(learner.device), *(() if learned is None else (learned[0],))]
        return learner.logits(torch.cat(parts)).argmax(dim=1).cpu(), torch.cat([torch.tensor(kept), own])
    found = [(learner.logits(maps).argmax(dim=1).cpu(), labels) for maps, labels in learner.maps_of(tested)]
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def _not_known(classes: list[str], guess: Tensor, own: Tensor) -> list[str]:
    """Which classes are not recognized on the very pictures that they were learned from: too few steps, too small a rate."""
    lines = []
    for k in sorted(set(own.tolist())):
        right, total = int((guess[own == k] == k).sum()), int((own == k).sum())
        if 2 * right < total:
            lines.append(
                f"warning: {right} of the {total} pictures that '{classes[k]}' was learned from are taken for it: more --steps,"
                " or a learner made with a higher --session.lr or with --method teen"
            )
    return lines


def _share(guess: Tensor, labels: Tensor, chosen: Tensor) -> float | None:
    return 100 * float((guess == labels)[chosen].double().mean()) if bool(chosen.any()) else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _report(
    learner: IncrementalLearner,
    maps: Tensor,
    names: list[str],
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    tested: Part | None,
    old_classes: list[str],
) -> dict[str, Any]:
    """Tables: accuracy of base, earlier and new classes, the old classes that lost most, and what the new ones resemble."""
    base, known = learner.base_classes, len(old_classes)
    rows = []
    for title, low, high in (("base classes (%)", 0, base), ("earlier new classes (%)", base, known)):
        pair = [_share(g, y, (y >= low) & (y < high)) for g, y in (before, after)]
        rows.append([title, *map(_shown, pair)])
    rows.append(["new classes (%)", "-", _shown(_share(*after, after[1] >= known))])
    losses = []
    for k, name in enumerate(old_classes):
        a, b = (_share(g, y, y == k) for g, y in (before, after))
        if a is not None and b is not None and b < a:
            losses.append((a - b, [name, f"{a:.1f}", f"{b:.1f}"]))
    worst = [row for _, row in sorted(losses, key=lambda item: -item[0])[:5]]
    logits = learner.logits(maps).cpu()
    own = torch.tensor([learner.classes.index(name) for name in names])
    others = logits.scatter(1, own[:, None], float("-inf"))
    wrong: list[list[object]] = []
    if tested is not None:
        for k in sorted(set(own.tolist())):
            missed = after[0][(after[1] == k) & (after[0] != k)]
            wrong += [
                [learner.classes[k], learner.classes[int(v)], int((missed == v).sum())] for v in torch.unique(missed)
            ]
    alike = []
    for k in sorted(set(own.tolist())):
        near = others[own == k].argmax(dim=1)
        values, counts = torch.unique(near, return_counts=True)
        for value, count in sorted(zip(values.tolist(), counts.tolist(), strict=True), key=lambda pair: -pair[1])[:3]:
            alike.append([learner.classes[k], learner.classes[value], f"{count} of {int((own == k).sum())}"])
    mechanism = learner.mechanism
    last = {key: values[-1] for key, values in vars(mechanism).items() if values}
    found = {
        "table": rows,
        "lost": worst,
        "alike": alike,
        "wrong": wrong,
        "mechanism": last,
        "classes": learner.classes,
    }
    return {**found, "warnings": _not_known(learner.classes, logits.argmax(dim=1), own)}
