"""`visctrl views`: references into all views of a scene, written back as a scene."""

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from torch import Tensor
from typing_extensions import override

from tenfold import UserError, checkpoints
from tenfold.cli import Invocation
from tenfold.distributed import rank, split, world_size
from tenfold.figures import image_grid
from tenfold.report import write_report
from tenfold.runs import Run
from tenfold.terminal import table, track
from visctrl.commands import _work
from visctrl.config import ViewsSettings
from visctrl.data import load_model, read_mask, read_mask_file, read_picture
from visctrl.engine import Reference, VisCtrl
from visctrl.masks import Mask, Picture, check_mask
from visctrl.outcome import EditOutput
from visctrl.provenance import color_map, color_name
from visctrl.ranks import gathered, joined, said_once, wait_for_all
from visctrl.scenes import read_scene
from visctrl.views import edit_views, pool_of
from visctrl.viewset import View, ViewSet, read_view, stored_size, upright_mask, write_view

SHOWN = 8
"""Views in the picture of the result."""
METHOD = "visctrl.view"


def run(settings: ViewsSettings, invocation: Invocation) -> None:
    """Read the scene, edit each view that is not there yet, and write the scene."""
    with joined():
        _run(settings, invocation)


def _run(settings: ViewsSettings, invocation: Invocation) -> None:
    folder = invocation.folder
    with said_once():
        scene = _scene_of(settings)
        files = _references(settings)
        empty = _checked(scene, settings)
    engine = VisCtrl(load_model(settings), settings.chosen)
    references = [
        _work.reference_of(
            engine,
            _work.prepare(engine, path, mask, settings.size, False, "--reference_mask", beside=scene.views[0].path),
            settings.reference_prompt,
        )
        for path, mask in files
    ]
    work = _Work(engine, scene, settings, folder, empty)
    sys.stdout.write(
        f"{scene.kind} scene {scene.root}: {len(scene.views)} views, cameras: {scene.cameras}; references: {len(references)}\n"
    )
    if world_size() > 1:
        names = [name for view in range(len(scene.views)) for name in work.files(view)]
        folder.share(names)
        wait_for_all()
    work.edit(references, quiet=invocation.quiet)
    wait_for_all()
    if rank() == 0:
        _finish(work)


def _scene_of(settings: ViewsSettings) -> ViewSet:
    places = Path(settings.target_mask) if settings.target_mask else None
    scene = read_scene(
        settings.data,
        missing=settings.missing,
        reconstruction=settings.reconstruction,
        pictures=settings.pictures,
        without=places if places is not None and places.is_dir() else None,
    )
    for remark in scene.remarks:
        warnings.warn(remark, stacklevel=3)
    return scene


def _references(settings: ViewsSettings) -> list[tuple[Path, str | None]]:
    """Files of the references with their masks, read once so that what is wrong is said before a model is loaded."""
    given: list[str | None] = list(settings.reference_mask) if settings.reference_mask else [None]
    masks = given * len(settings.reference) if len(given) == 1 else given
    pairs = [(Path(path), mask) for path, mask in zip(settings.reference, masks, strict=True)]
    for path, mask in pairs:
        picture = read_picture(path)
        if mask is not None:
            read_mask(mask, path, picture, "--reference_mask")
    return pairs


def _checked(scene: ViewSet, settings: ViewsSettings) -> set[int]:
    """Make sure that every view and mask can be read; returns the views in which nothing of the subject is seen.

    In several processes each looks at its share, and all refuse for what one of them has found.
    """
    problems, empty, sizes = {}, {}, {}
    for number in split(range(len(scene.views)), rank(), world_size()):
        view = scene.views[number]
        try:
            picture = read_view(view)
            mask = view_mask(settings.target_mask, view, picture)
            empty[number] = mask is not None and not bool((mask >= 0.5).any())
            w, h = stored_size(view)
            if view.size is not None and view.size != (w, h):
                sizes[number] = f"{view.name} has {w} x {h} pixels, its camera {view.size[0]} x {view.size[1]}"
        except UserError as error:
            problems[number] = str(error)
    problems, empty, sizes = gathered(problems), gathered(empty), gathered(sizes)
    if problems:
        more = f" (and {len(problems) - 1} more views)" if len(problems) > 1 else ""
        raise UserError(next(iter(problems.values())) + more)
    if sizes:
        warnings.warn(
            f"{len(sizes)} of {len(scene.views)} pictures are not of their camera's size, {next(iter(sizes.values()))}:"
            " they are written as large as they are",
            stacklevel=3,
        )
    nothing = {number for number, is_empty in empty.items() if is_empty}
    if len(nothing) == len(scene.views):
        raise UserError(f"--target_mask {settings.target_mask}: nothing of the subject is in any view's mask")
    for number in sorted(nothing):
        warnings.warn(f"{scene.views[number].name} is written as it was: its mask is empty", stacklevel=3)
    return nothing


def view_mask(spec: str | None, view: View, picture: Picture) -> Mask | None:
    """Where the subject is in a view, upright; it may be nowhere.

    Raises:
        UserError: no such mask, or one of another size.
    """
    if spec is None:
        return None
    if spec in {"alpha", "white"}:
        try:
            return read_mask(spec, view.path, picture, "--target_mask")
        except UserError as error:
            if "no pixel of the subject" in str(error):
                return np.zeros(picture.shape[:2], np.float32)
            raise
    file = view.mask if spec == "scene" else _mask_in(Path(spec), view)
    if file is None or not file.is_file():
        where = "the scene has no mask of it" if file is None else f"{file} is not there"
        raise UserError(f"--target_mask {spec}: {view.name}: {where}")
    found = upright_mask(read_mask_file(file, f"--target_mask {file}"), view)
    if (found >= 0.5).any():
        try:
            check_mask(found, picture, f"--target_mask {file}")
        except ValueError as error:
            raise UserError(str(error)) from error
    return found if found.shape == picture.shape[:2] else np.zeros(picture.shape[:2], np.float32)


def _mask_in(folder: Path, view: View) -> Path:
    """The mask of a view in a folder: under its whole name or that without its first folder, as a PNG or in its format."""
    if not folder.is_dir():
        raise UserError(f"--target_mask {folder}: expected scene, alpha, white, or a folder of masks")
    parts = Path(view.name).parts
    names = [Path(*parts[start:]) for start in range(min(2, len(parts)))]
    tried = [folder / path for name in names for path in (name.with_suffix(".png"), Path(f"{name}.png"), name)]
    return next((path for path in tried if path.is_file()), tried[0])


class _Work:
    """The views of a scene, those that are there, and how the others are made."""

    def __init__(self, engine: VisCtrl, scene: ViewSet, settings: ViewsSettings, folder: Run, empty: set[int]) -> None:
        self.engine = engine
        self.scene = scene
        self.settings = settings
        self.folder = folder
        self.empty = empty
        self.seen = [number for number in range(len(scene.views)) if number not in empty]
        self.pool = pool_of(len(self.seen), settings.sampling, settings.seed)
        self._last: tuple[int, _work.Prepared] | None = None

    def files(self, number: int) -> list[str]:
        """All that is written for a view; what says that it is there comes last."""
        latents = [f"views/{number:05}.safetensors"] if self._in_pool(number) else []
        return [
            f"scene/{self.scene.views[number].name}",
            f"views/{number:05}.png",
            *latents,
            f"views/{number:05}.json",
        ]

    def _in_pool(self, number: int) -> bool:
        return number in self.seen and self.seen.index(number) in self.pool

    def done(self, number: int) -> bool:
        """Whether a view was made by the run that this one continues."""
        return self.folder.resumed and (self.folder.path / f"views/{number:05}.json").is_file()

    def prepared(self, number: int) -> _work.Prepared:
        """A view as the model takes it."""
        if self._last is None or self._last[0] != number:
            view, size = self.scene.views[number], self.settings.size
            picture = read_view(view)
            mask = view_mask(self.settings.target_mask, view, picture)
            fitted = _work.fitted(
                self.engine, picture, mask, size, f"--target_mask {self.settings.target_mask}: {view.name}"
            )
            self._last = (number, fitted)
        return self._last[1]

    def edit(self, references: Sequence[Reference], *, quiet: bool) -> None:
        """Make this process's share of the views that are not there yet."""
        made: dict[int, Tensor | None] = {}
        for place, number in enumerate(self.seen):
            if self.done(number):
                made[place] = self._latents(number) if place in self.pool else None
        s = self.settings
        edits = edit_views(
            self.engine,
            _Lazy(self, masks=False),
            references,
            s.sampling,
            masks=_Lazy(self, masks=True) if s.target_mask is not None else None,
            seed=s.seed,
            prompt=s.target_prompt,
            negative_prompt=s.negative_prompt,
            sheets=True,
            made=made,
        )
        share = -(-(len(self.seen) - len(made)) // world_size())
        with _work.named(f"--data {s.data}", "fewer references"):
            for place, out in track(edits, "views", share, quiet=quiet):
                self._write(self.seen[place], out)
        for number in split(sorted(self.empty), rank(), world_size()):
            if not self.done(number):
                self._keep(number)

    def _latents(self, number: int) -> Tensor:
        return checkpoints.load(self.folder.path / f"views/{number:05}.safetensors", method=METHOD).tensors["latents"]

    def _keep(self, number: int) -> None:
        """Write a view in which there is nothing to edit."""
        view = self.scene.views[number]
        with self.folder.replacing(f"scene/{view.name}") as temporary:
            temporary.write_bytes(view.path.read_bytes())
        self.folder.write_json(
            f"views/{number:05}.json", {"view": view.name, "round": 0, "verdict": "its mask is empty"}
        )

    def _write(self, number: int, out: EditOutput) -> None:
        """Write the picture, the sheet, the latents where others need them, and last what happened."""
        view, target, folder = self.scene.views[number], self.prepared(number), self.folder
        locked = self.engine.config.lock
        result = _work.finished_picture(out.images, target, self.settings.feather, locked)
        with folder.replacing(f"scene/{view.name}") as temporary:
            write_view(temporary, view, result, "edited with visctrl")
        rounds = [_work.finished_picture(x, target, self.settings.feather, locked) for x in out.history or []]
        row = {"view": target.photo, **{f"round {i + 1}": x for i, x in enumerate(rounds)}, "edited": result}
        if out.provenance:
            row |= {"came from": _work.enlarged(out.provenance[0]), _work.KEY: color_map((64, 64))}
        shares = self._shares(out)
        if out.read_from:
            row[_legend(shares)] = _work.enlarged(out.read_from[0])
        image_grid(folder.own(f"views/{number:05}.png"), [list(row.values())], column_titles=list(row), cell=1.6)
        if self._in_pool(number):
            path = folder.own(f"views/{number:05}.safetensors")
            checkpoints.save(path, {"latents": out.latents.cpu()}, method=METHOD, config={"view": view.name})
        about = {
            "view": view.name,
            "size": list(target.shown.shape[:2]),
            "round": (out.rounds or [0])[0],
            "verdict": (out.verdicts or [""])[0],
            "residuals": [None if x[0] != x[0] else x[0] for x in out.residuals or []],
            "rows": out.rows,
            "read_from": {name: round(share, 4) for name, _, share in shares},
            "reference_for_others": self._in_pool(number),
            "unsafe": None if out.unsafe is None else out.unsafe[0],
        }
        folder.write_json(f"views/{number:05}.json", about)

    def _shares(self, out: EditOutput) -> list[tuple[str, str, float]]:
        """Name, color and share of each reference that parts of a view came from."""
        views = [f"view {self.seen[place]}" for place in self.pool]
        names = [*(f"reference {i + 1}" for i in range(len(self.settings.reference))), *views]
        found = enumerate((out.shares or [[]])[0])
        return [(names[j], color_name(j), share) for j, share in found if share > 0]


def _legend(shares: Sequence[tuple[str, str, float]]) -> str:
    """The heading of a picture of references."""
    return "\n".join(["of", *(f"{name} ({color})" for name, color, _ in shares)])


class _Lazy(Sequence[Any]):
    """Images or masks of the views that show the subject, read when their turn comes."""

    def __init__(self, work: _Work, *, masks: bool) -> None:
        self.work = work
        self.masks = masks

    @override
    def __len__(self) -> int:
        return len(self.work.seen)

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Any]: ...
    @override
    def __getitem__(self, place: Any) -> Any:
        found = self.work.prepared(self.work.seen[place])
        return found.image_mask if self.masks else found.image


def _finish(work: _Work) -> None:
    """Write cameras and all that belongs to the scene, the table of its views, and the pictures of the result."""
    folder, scene = work.folder, work.scene
    with folder.replacing_folder("scene") as temporary:
        scene.write_rest(temporary)
    records = [
        json.loads((folder.path / f"views/{number:05}.json").read_text(encoding="utf-8"))
        for number in range(len(scene.views))
    ]
    about = {
        "kind": scene.kind,
        "source": str(scene.root),
        "cameras": scene.cameras,
        "left_out": dict(scene.left_out),
        "remarks": list(scene.remarks),
        "views": records,
    }
    folder.write_json("views.json", about)
    chosen = sorted({round(x) for x in np.linspace(0, len(scene.views) - 1, SHOWN)})
    views = [scene.views[i] for i in chosen]
    rows = {
        "references": [read_picture(path) for path in work.settings.reference[:SHOWN]],
        "view": [read_view(view) for view in views],
        "edited": [read_picture(folder.path / "scene" / view.name) for view in views],
    }
    names = [Path(view.name).stem[-14:] for view in views]
    below = [[""] * len(rows["references"]), names, [""] * len(views)]
    for path in (folder.own("grid.png"), folder.figure("views")):
        image_grid(path, list(rows.values()), row_titles=list(rows), titles=below, cell=1.4)
    write_report(folder, "visctrl views", {"views": "References, views of the scene, and what became of them."})
    shown = [
        [x["view"], x["round"], x.get("rows", 0), _ended(x)] for x in (records if len(records) <= 40 else records[:40])
    ]
    sys.stdout.write(table(["view", "round", "rows of the network", "ended by"], shown) + "\n")
    if len(records) > 40:
        sys.stdout.write(f"and {len(records) - 40} more in {folder.path / 'views.json'}\n")
    sys.stdout.write(f"{folder.path / 'scene'}\n")


def _ended(record: dict[str, Any]) -> str:
    if record.get("unsafe"):
        return "blanked by the model's safety checker"
    return str(record["verdict"] or "all rounds")
