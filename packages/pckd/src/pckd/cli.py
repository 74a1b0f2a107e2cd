"""The command `pckd`: train, evaluate, compare, inspect, cache, export, and the demonstration."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pckd.config import (
    CacheSettings,
    CompareSettings,
    DemoSettings,
    EvaluateSettings,
    ExportSettings,
    TrainSettings,
)
from tenfold import UserError
from tenfold.cli import App, Invocation, Verb, show_claims, table, track

if TYPE_CHECKING:
    from torch import nn

    from pckd.data import Data
    from pckd.training import Teacher, Trained


def _study(run: Any, command: str, data: "Data", seeds: list[int]) -> Any:
    from pckd import __version__
    from tenfold.claims import Study

    head: dict[str, Any] = {
        "package": "pckd",
        "version": __version__,
        "command": command,
        "data": data.source,
        "level": "full",
    }
    return Study(run, seeds=seeds, **head)


def _save_student(run: Any, trained: "Trained", spec: str, data: "Data", folder: str = "") -> None:
    from pckd import __version__
    from pckd.models import METHOD, STUDENT
    from tenfold import checkpoints

    card = {
        "model": spec,
        "classes": list(data.classes),
        "size": data.size,
        "mean": list(data.mean),
        "std": list(data.std),
        "tap": trained.tap,
        "epoch": trained.epoch,
        "top1": trained.top1,
    }
    path = run.own(f"{folder}{STUDENT}")
    checkpoints.save(path, trained.model.state_dict(), method=METHOD, version=__version__, config=card)
    run.write_json(f"{folder}config.json", card)


def _train(settings: TrainSettings, invocation: Invocation) -> None:
    import time

    import numpy as np

    from pckd import analysis
    from pckd.cache import TeacherCache
    from pckd.data import load
    from pckd.training import cache_card, load_teacher, train_student
    from tenfold.report import write_report

    start = time.perf_counter()
    run, method = invocation.folder, settings.chosen_method
    data = load(settings.data, settings.reading)
    teacher = cache = None
    if settings.teacher is not None:
        teacher = load_teacher(settings.teacher, settings.teacher_weights, data)
    if settings.cache is not None:
        if teacher is None or data.train.images is None:
            raise UserError("--cache needs --teacher, and images that are kept in memory (--reading.resident_gb)")
        cache = TeacherCache(settings.cache)
        cache.check(cache_card(data, settings.views, settings.seed, teacher.hash))
    trained = train_student(data, settings, method, run=run, teacher=teacher, cache=cache, quiet=invocation.quiet)
    _save_student(run, trained, settings.student, data)
    with run.replacing("weights.npz") as path:
        np.savez_compressed(path, **trained.preview)
    preview = settings.losses.pckd.preview
    analysis.draw_accuracy(run, {method: [trained.history]}, f"{settings.student}, {method}")
    analysis.draw_difficulty(run, trained.preview, preview, weighted=method in {"pckd", "pckd-nokd"})
    names = [data.train.name(i) for i in range(len(data.train))]
    analysis.write_previewed(run, [trained.preview], names, data.train.labels, data.classes, data.train.pixels)
    study = _study(run, "train", data, [settings.seed])
    study.over_arms({method: lambda seed: {"top1": trained.top1, "last": trained.last, "best on test": trained.best}})
    if data.val is None:
        study.note(
            f"Reported is the last epoch. The best epoch on the test images, {trained.best:.2f} %, flatters: it was chosen"
            " on them. --reading.val_fraction 0.1 chooses on held-out training images."
        )
    study.finish(time.perf_counter() - start)
    captions = {
        "accuracy": "Accuracy on the test images by epoch.",
        "difficulty": "Left: difficulty that half, 90 % and 99 % of the samples stay below. Right: what preview does.",
        "previewed": "The training images that were hardest to learn, hardest first; beside each row, their labels in order."
        " Mislabeled images gather here. previewed.csv has them all.",
    }
    write_report(run, f"pckd train: {settings.student} by {method}", captions)
    sys.stdout.write(
        f"{method}: {trained.top1:.2f} % of the test images right at epoch {trained.epoch} (last epoch {trained.last:.2f} %,"
        f" best on the test images {trained.best:.2f} %); student in {run.path}, hardest images in previewed.csv\n"
    )


def _student_of(folder: str) -> "tuple[nn.Module, dict[str, Any]]":
    from pckd.models import STUDENT, build, read_card

    card = read_card(folder)
    return build(card["model"], len(card["classes"]), str(Path(folder) / STUDENT)), card


def _evaluate(settings: EvaluateSettings, invocation: Invocation) -> None:
    import torch
    import yaml

    from pckd import analysis
    from pckd.config import DataSettings
    from pckd.data import load
    from pckd.training import load_teacher, predict
    from tenfold.trainer_config import choose_device

    model, card = _student_of(settings.run)
    source, reading = settings.data, DataSettings()
    if source is None:
        config = yaml.safe_load((Path(settings.run) / "config.yaml").read_text(encoding="utf-8"))
        source, reading = config["data"], DataSettings(**config["reading"])
    elif source.partition(":")[0] in {"imagefolder", "tinyimagenet"}:
        reading = DataSettings(size=card["size"])
    data = load(source, reading)
    if list(data.classes) != card["classes"]:
        odd = sorted(set(data.classes) ^ set(card["classes"]))
        raise UserError(
            f"--data {source}: its classes are not those of {settings.run} (differing: {', '.join(odd[:5])})"
        )
    device = choose_device(settings.device)
    statistics = (tuple(card["mean"]), tuple(card["std"]))
    labels = data.test.labels
    out = predict(model.to(device), data.test, statistics, tap=card["tap"], batch_size=settings.batch_size)
    found = {"top1": analysis.top_k(out.logits, labels), "top5": analysis.top_k(out.logits, labels, 5)}
    found["fisher ratio"] = analysis.fisher_ratio(out.feature, labels)
    if settings.teacher is not None:
        teacher = load_teacher(settings.teacher, settings.teacher_weights, data)
        taught = predict(teacher.plain.to(device), data.test, teacher.statistics, batch_size=settings.batch_size)
        found["teacher's top1"] = analysis.top_k(taught.logits, labels)
        found["teacher's fisher ratio"] = analysis.fisher_ratio(taught.feature, labels)
        found["same answer as the teacher"] = analysis.top_k(out.logits, taught.logits.argmax(dim=1))
        found["center correlation"] = analysis.center_correlation(out.weight, taught.weight)
    guess = out.logits.argmax(dim=1)
    each = {
        name: 100 * float((guess[labels == i] == i).double().mean())
        for i, name in enumerate(data.classes)
        if bool((labels == i).any())
    }
    wrong = torch.stack([labels[guess != labels], guess[guess != labels]])
    pairs, counts = torch.unique(wrong, dim=1, return_counts=True)
    common = [
        [data.classes[int(pairs[0, i])], data.classes[int(pairs[1, i])], int(counts[i])]
        for i in counts.argsort(descending=True)[:5]
    ]
    invocation.folder.write_json("evaluation.json", {**found, "classes": each, "confusions": common})
    sys.stdout.write(table(["metric", "value"], [[k, f"{v:.4g}"] for k, v in found.items()]) + "\n\n")
    worst = sorted(each.items(), key=lambda item: item[1])[:5]
    sys.stdout.write(table(["worst classes", "right (%)"], [[k, f"{v:.4g}"] for k, v in worst]) + "\n")
    if common:
        sys.stdout.write("\n" + table(["label", "answer", "images"], common) + "\n")


def _compare(settings: CompareSettings, invocation: Invocation) -> int:
    import numpy as np

    from pckd import analysis
    from pckd.data import load
    from pckd.training import as_teacher, load_teacher, predict, train_student, train_teacher
    from tenfold.report import write_report

    run = invocation.folder
    data = load(settings.data, settings.reading)
    assert settings.teacher is not None
    if settings.teacher_weights is not None:
        teacher = load_teacher(settings.teacher, settings.teacher_weights, data)
    else:
        trained = train_teacher(data, settings, run, quiet=invocation.quiet)
        _save_student(run, trained, settings.teacher, data, "teacher/")
        teacher = as_teacher(trained.model, data)
    taught = predict(teacher.plain, data.test, teacher.statistics, tap=settings.teacher_tap)
    study = _study(run, "compare", data, settings.seeds)
    accuracy = analysis.top_k(taught.logits, data.test.labels)
    study.note(f"The teacher, {settings.teacher}, has {accuracy:.2f} % of the test images right.")

    def measure(method: str, seed: int) -> dict[str, float]:
        done = train_student(
            data,
            dataclasses.replace(settings, seed=seed),
            method,
            run=run,
            stage=f"{method}-seed-{seed}",
            teacher=teacher,
            quiet=invocation.quiet,
        )
        with run.replacing(f"preview/{method}-seed-{seed}.npz") as path:
            np.savez_compressed(path, **done.preview, history=np.asarray(done.history))
        out = predict(done.model, data.test, (data.mean, data.std), tap=done.tap)
        return {
            "top1": done.top1,
            "best on test": done.best,
            "agreement": analysis.top_k(out.logits, taught.logits.argmax(dim=1)),
            "fisher ratio": analysis.fisher_ratio(out.feature, data.test.labels),
            "center correlation": analysis.center_correlation(out.weight, taught.weight),
        }

    def arm(method: str) -> Any:
        return lambda seed: measure(method, seed)

    study.over_arms({method: arm(method) for method in settings.methods})
    analysis.decide_comparison(study, settings.methods)
    kept = {
        m: [dict(np.load(run.path / f"preview/{m}-seed-{s}.npz", allow_pickle=False)) for s in settings.seeds]
        for m in settings.methods
    }
    analysis.draw_accuracy(run, {m: [k["history"].tolist() for k in rows] for m, rows in kept.items()})
    analysis.draw_arms(run, study, settings.methods)
    hardest = next((m for m in ("pckd", "pckd-nokd") if m in kept), settings.methods[-1])
    preview = settings.losses.pckd.preview
    analysis.draw_difficulty(run, kept[hardest][0], preview, weighted=hardest.startswith("pckd"))
    names = [data.train.name(i) for i in range(len(data.train))]
    analysis.write_previewed(run, kept[hardest], names, data.train.labels, data.classes, data.train.pixels)
    summary = study.finish()
    captions = {
        "methods": "Accuracy of the last epoch (or of the best on held-out images): mean over seeds with its 95 % interval,"
        " a faint dot for each seed.",
        "accuracy": "Accuracy by epoch, mean over seeds with its interval.",
        "difficulty": f"Difficulty of the training images for {hardest}, seed {settings.seeds[0]}.",
        "previewed": "The training images that were hardest to learn over all seeds, hardest first; beside each row, their"
        " labels in order. Mislabeled images gather here. previewed.csv has them all.",
    }
    write_report(run, f"pckd compare: {settings.student} from {settings.teacher}", captions)
    metrics = ["top1", "best on test", "agreement", "fisher ratio", "center correlation"]
    sys.stdout.write(analysis.arms_table(study, settings.methods, metrics) + "\n\n")
    return show_claims(summary, strict=invocation.strict)


def _inspect(settings: TrainSettings, invocation: Invocation) -> None:
    import torch

    from pckd.analysis import floor
    from pckd.data import load
    from pckd.distiller import Distiller
    from pckd.losses import PCKDLoss
    from pckd.models import build
    from pckd.training import example_images, load_teacher
    from pckd.views import MultiView, normalize

    data = load(settings.data, settings.reading)
    torch.manual_seed(settings.seed)
    student = build(settings.student, len(data.classes), settings.student_weights)
    teacher: Teacher | None = None
    if settings.teacher is not None:
        teacher = load_teacher(settings.teacher, settings.teacher_weights, data)
    method = settings.chosen_method
    statistics = (data.mean, data.std)
    distiller = Distiller(
        student,
        None if teacher is None else (teacher.plain if method == "fitnet" else teacher.model),
        method,
        settings.losses,
        example=example_images(data, statistics),
        tap=settings.tap,
        teacher_tap=settings.teacher_tap,
    )
    taps: list[Any] = [["student", settings.student, distiller.student]]
    if distiller.teacher is not None:
        taps.append(["teacher", settings.teacher, distiller.teacher])
    rows = [
        [who, spec, f"{sum(p.numel() for p in tap.model.parameters()):,}", tap.path, tap.feature_dim, tap.num_classes]
        for who, spec, tap in taps
    ]
    sys.stdout.write(table(["", "model", "parameters", "classifier", "feature", "classes"], rows) + "\n\n")
    heads = {name: sum(p.numel() for p in part.parameters()) for name, part in distiller.objective.named_children()}
    if any(heads.values()):
        rows = [[name, f"{count:,}"] for name, count in heads.items() if count]
        sys.stdout.write(table(["head, of the training only", "parameters"], rows) + "\n\n")
    views = MultiView(settings.views, settings.seed)
    index = torch.randperm(len(data.train))[: settings.batch_size]
    made = views(data.train.pixels(index), index, 0)
    images, labels = normalize(made, *statistics), data.train.labels[index]
    shown = None if teacher is None else normalize(made, *teacher.statistics)
    features = distiller.student(images)
    taught = None if teacher is None else distiller.teach(images if shown is None else shown, settings.views.count)
    loss = distiller.objective(features, taught, labels, 1, settings.epochs)
    config = settings.losses.pckd
    weights = {"ce": 1.0, "kd": config.delta, "cc": config.beta, "ca": config.alpha, "fa": config.f}
    if not isinstance(distiller.objective, PCKDLoss):
        kd = settings.losses.kd
        weights = {
            "ce": kd.ce if method == "kd" else 1.0,
            "kd": kd.kd,
            "dkd": 1.0,
            "fitnet": settings.losses.fitnet.weight,
        }
    rows = []
    for name, value in loss.terms.items():
        rows.append([name, f"{float(value):.4g}", f"{weights[name]:.4g}", f"{weights[name] * float(value):.4g}"])
    sys.stdout.write(f"one batch of {len(labels)} images in {settings.views.count} views, first epoch, {method}\n")
    norm = torch.autograd.grad(loss.total, features.feature, retain_graph=True)[0].norm()
    sys.stdout.write(table(["term", "value", "weight", "weighted"], rows) + "\n")
    sys.stdout.write(
        f"total {float(loss.total.detach()):.4g}; gradient norm at the feature {float(norm):.4g};"
        f" mean preview weight {float(loss.weights.mean()):.3f}\n"
    )
    if "cc" in loss.terms and config.contrast == "relation":
        least = floor(config, labels, settings.views.count)
        sys.stdout.write(
            f"the contrast is scaled by tau / tau0 = {config.tau / config.tau0:.1f}, an effective weight of"
            f" {config.beta * config.tau / config.tau0:.3g} a row, and cannot fall below {least:.4g} in this batch\n"
        )


def _cache(settings: CacheSettings, invocation: Invocation) -> None:
    import torch

    from pckd.cache import TeacherCache
    from pckd.data import load
    from pckd.tap import ClassifierTap
    from pckd.training import cache_card, load_teacher, teaching

    data = load(settings.data, settings.reading)
    if data.train.images is None:
        raise UserError(
            "a cache needs images that are kept in memory: raise --reading.resident_gb or lower --reading.size"
        )
    teacher = load_teacher(settings.teacher, settings.teacher_weights, data)
    head = ClassifierTap(teacher.plain, settings.teacher_tap).classifier
    batches = [
        (epoch, index)
        for epoch in range(settings.epochs)
        for index in torch.split(torch.arange(len(data.train)), settings.batch_size)
    ]
    shape = (settings.epochs, len(data.train), settings.views.count)
    TeacherCache.write(
        invocation.folder,
        {**cache_card(data, settings.views, settings.seed, teacher.hash), "epochs": settings.epochs},
        teaching(teacher, settings, data),
        track(batches, "teacher", quiet=invocation.quiet),
        head,
        shape,
    )
    size = sum(path.stat().st_size for path in invocation.folder.path.glob("*.npy")) / 1e6
    sys.stdout.write(
        f"{shape[0]} epochs of {shape[1]} images in {shape[2]} views, {size:.0f} MB in {invocation.folder.path};"
        " next: pckd train --cache with the same --data, --seed, --views and --reading\n"
    )


def _export(settings: ExportSettings, invocation: Invocation) -> None:
    import torch

    from pckd.models import STUDENT
    from tenfold.errors import MissingExtraError

    run = invocation.folder
    model, card = _student_of(settings.run)
    model.eval()
    example = torch.zeros(2, 3, card["size"], card["size"])
    if settings.format == "safetensors":
        name = STUDENT
        from safetensors.torch import save_file

        with run.replacing(name) as path:
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    elif settings.format == "torch-export":
        name = "student.pt2"
        batch = torch.export.Dim("batch", min=1, max=65535)
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        with run.replacing(name) as path:
            torch.export.save(program, path)
    else:
        name = "student.onnx"
        try:
            import onnx
            import onnxscript  # noqa: F401  # torch's exporter imports it
        except ImportError as error:
            raise MissingExtraError('ONNX needs onnx and onnxscript; pip install "pckd[onnx]"') from error
        batch = torch.export.Dim("batch", min=1, max=65535)
        done = torch.onnx.export(
            model,
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: batch},),
            dynamo=True,
            verbose=False,
        )
        assert done is not None
        onnx.checker.check_model(done.model_proto)
        with run.replacing(name) as path:
            path.write_bytes(done.model_proto.SerializeToString())
    run.write_json("config.json", card)
    sys.stdout.write(
        f"{run.path / name}: {card['model']}, images (N, 3, {card['size']}, {card['size']}) as (x / 255 - mean) / std with"
        f" mean {card['mean']}, std {card['std']} -> logits of {len(card['classes'])} classes, named in config.json\n"
    )


def _demo(settings: DemoSettings, invocation: Invocation) -> int:
    from pckd import demo

    sys.stdout.write(f"data: {demo.DATA}\n")
    sys.stdout.flush()
    return show_claims(demo.run(settings, invocation.folder, quiet=invocation.quiet), strict=invocation.strict)


app = App(
    "pckd",
    "pckd",
    "Distill a big image classifier into a small one: category contrast with preview weights, and what it bought you.",
    (
        Verb("train", TrainSettings, _train, "Train a student from a teacher, or a teacher from the labels."),
        Verb(
            "evaluate",
            EvaluateSettings,
            _evaluate,
            "Measure a trained student: accuracy, classes, confusions, geometry.",
        ),
        Verb(
            "compare", CompareSettings, _compare, "Methods x seeds on your images, with paired intervals.", claims=True
        ),
        Verb(
            "inspect", TrainSettings, _inspect, "Show layers, heads and the size of each term on one batch.", out=False
        ),
        Verb("cache", CacheSettings, _cache, "Keep the teacher's outputs, so that training need not run it."),
        Verb("export", ExportSettings, _export, "Write a trained student for elsewhere."),
        Verb(
            "demo",
            DemoSettings,
            _demo,
            "Look-alike letters: what a small student gains, and from which term.",
            claims=True,
        ),
    ),
)
main = app.main
