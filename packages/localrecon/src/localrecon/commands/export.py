"""``localrecon export``: a trained model's weights under its own key names."""

import sys

from safetensors.torch import save_file

from localrecon.commands import _files
from localrecon.config import ExportSettings
from localrecon.net import LocalNet
from tenfold.cli import Invocation


def run(settings: ExportSettings, invocation: Invocation) -> None:
    """Write ``model.safetensors`` and ``config.json``, and with ``--heads`` the local heads and the plan."""
    trained = _files.load(settings)
    folder, net, training, form = invocation.folder, trained.net, trained.settings, trained.data.form
    state = _files.backbone_of(net).state_dict()
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    with folder.replacing("model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    about = {
        "model": training.model,
        "method": training.method,
        "task": form.task,
        "input": list(form.shape),
        "classes": form.classes,
        "width": training.width,
        "depth": training.depth,
        "names": list(trained.data.classes),
    }
    folder.write_json("config.json", about)
    if settings.heads and isinstance(net, LocalNet):
        heads = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in net.heads.state_dict().items()}
        with folder.replacing("heads.safetensors") as temporary:
            save_file(heads, temporary, metadata={"format": "pt"})
        folder.write_text(_files.PLAN, net.plan.to_json() + "\n")
    size = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
    sys.stdout.write(
        f"{folder.path / 'model.safetensors'}: {len(tensors)} tensors, {size:.1f} MiB, under the model's own names\n"
    )
