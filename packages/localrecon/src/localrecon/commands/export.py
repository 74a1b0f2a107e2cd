"""``localrecon export``: a trained model for elsewhere, under its own key names."""

import sys

import torch

from localrecon.commands import _files
from localrecon.config import ExportSettings
from localrecon.net import LocalNet
from tenfold import UserError, export
from tenfold.cli import Invocation
from tenfold.randomness import generator


def run(settings: ExportSettings, invocation: Invocation) -> None:
    """Write the model and ``config.json``, and with ``--heads`` the local heads and the plan."""
    folder = invocation.folder
    trained = _files.load(settings.run)
    net, form = trained.net, trained.form
    if settings.heads and not isinstance(net, LocalNet):
        raise UserError("--heads: a run of bpfree has no local heads beside its layers")
    if form.task == "lm":
        example = torch.randint(form.classes, (2, *form.shape), generator=generator(0))
    else:
        example = torch.zeros(2, *form.shape)
    inputs = ("tokens",) if form.task == "lm" else ("images",)
    model = _files.backbone_of(net)
    written = export.save(model, example, folder, "model", settings.format, inputs=inputs)
    folder.write_json(_files.CARD, _files.card(trained.settings, form, trained.names))
    if settings.heads and isinstance(net, LocalNet):
        export.save(net.heads, (), folder, "heads")
        folder.write_text(_files.PLAN, net.plan.to_json() + "\n")
    sys.stdout.write(
        f"{written.path}: {written.tensors} tensors, {written.bytes / 2**20:.1f} MiB, under the model's own names;"
        f" takes {form}\n"
    )
