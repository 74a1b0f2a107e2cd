"""`pckd evaluate`: what a trained student gets right, what it confuses, and how like its teacher it is."""

import sys

import torch

from pckd import analysis
from pckd.commands._files import finished, student_of
from pckd.config import DataSettings, EvaluateSettings
from pckd.data import load
from pckd.teacher import load_teacher
from pckd.training import predict
from tenfold import UserError
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.terminal import table


def run(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Measure, write ``evaluation.json``, and print the numbers, the worst classes and the commonest confusions."""
    device = choose_device(settings.device)
    trained = finished(settings.run)
    model, card = student_of(trained.path)
    source, reading = trained.settings.data, trained.settings.reading
    if settings.data is not None:
        source = settings.data
        reading = DataSettings(**{"size": card["size"], "channels": len(card["mean"])})
    data = load(source, reading)
    if list(data.classes) != card["classes"]:
        odd = sorted(set(data.classes) ^ set(card["classes"]))
        what = f"differing: {', '.join(odd[:5])}" if odd else "the same in another order"
        raise UserError(f"--data {source}: its classes are not those of {settings.run} ({what})")
    statistics = (tuple(card["mean"]), tuple(card["std"]))
    labels = data.test.labels
    out = predict(model.to(device), data.test, statistics, tap=card["tap"], batch_size=settings.batch_size)
    found = {"top1": analysis.top_k(out.logits, labels), "top5": analysis.top_k(out.logits, labels, 5)}
    found["fisher ratio"] = analysis.fisher_ratio(out.feature, labels)
    if settings.teacher is not None:
        teacher = load_teacher(settings, data).to(device)
        taught = predict(teacher, data.test, batch_size=settings.batch_size)
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
