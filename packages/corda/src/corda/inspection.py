"""What the files of the command line hold, as text for a terminal, layer by layer."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from corda.anchor import MARK
from corda.context import ContextStats
from corda.convert import read_adapter
from tenfold import UserError
from tenfold.cli import claims_table, table

STATS = "context.safetensors"
CANDIDATES = "context-*.safetensors"
INITIAL = "corda_init"
RESIDUAL = "residual"
REPORT = "corda_report.json"
RANKS = "ranks.json"
VERIFICATION = "verification.json"
CONVERSION = "conversion.json"
TRUNCATION = "truncation.json"
SUMMARY = "summary.json"
ADAPTER = "adapter_config.json"


def describe(path: Path) -> str:
    """Any folder or file of ours, or a LoRA adapter's folder.

    Raises:
        UserError: nothing there that is ours.
    """
    if path.is_dir():
        known = (*TEXTS, STATS, ADAPTER)
        found = next((path / name for name in known if (path / name).is_file()), None)
        if found is None and list(path.glob(CANDIDATES)):
            return "\n".join(f"{file.name}\n{stats_text(ContextStats.load(file))}" for file in stats_files(path))
        if found is None:
            raise UserError(f"{path}: none of {', '.join(known)} in it")
        path = found
    if path.name == ADAPTER or path.name == "adapter_model.safetensors":
        return adapter_text(path.parent)
    if path.suffix == ".json":
        report = read_json(path)
        for text, fields in TEXTS.values():
            if fields <= set(report):
                return text(report)
        raise UserError(f"{path}: not a file of ours; its fields are {', '.join(report)}")
    return stats_text(ContextStats.load(path))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: no such file, or something else in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected an object with named fields, found {type(content).__name__}")
    return content


def stats_files(path: Path) -> list[Path]:
    """The files of statistics that a path means: itself, or those in the folder of a command.

    Raises:
        UserError: a folder without any.
    """
    if not path.is_dir():
        return [path]
    found = sorted(path.glob(CANDIDATES), key=lambda file: (len(file.name), file.name))
    found = [path / STATS] if (path / STATS).is_file() else found
    if not found:
        raise UserError(f"{path}: no {STATS} in it; expected a folder of `corda stats`")
    return found


def stats_text(stats: ContextStats) -> str:
    """Groups of layers that share an input."""
    rows = []
    for group in dict.fromkeys(stats.groups.values()):
        moment = stats.moments[group]
        members = [name.rpartition(".")[2] for name, leader in stats.groups.items() if leader == group]
        parent = group.rpartition(".")[0]
        tokens, inputs = stats.tokens[group], moment.shape[-1]
        name = f"{parent}.{{{','.join(members)}}}" if len(members) > 1 else group
        kind = "W C" if group in stats.traces else "C"
        rows.append([name, kind, _by(moment.shape), tokens, f"{tokens / inputs:.1f}"])
    return (
        table(["layers of one input", "sum", "shape", "tokens", "tokens / inputs"], rows)
        + f"\nscale {stats.scale}, {len(stats.groups)} layers, model {stats.fingerprint[:12]}\n"
    )


def init_text(report: dict[str, Any]) -> str:
    """What `corda init` did to each layer."""
    headers = ["layer", "shape", "rank", "sigma first", "sigma last", "output energy", "solver", "seconds"]
    rows = [
        [
            name,
            _by(layer["shape"]),
            layer["rank"],
            f"{layer['sigma_first']:.3g}",
            f"{layer['sigma_last']:.3g}",
            "-" if layer["output_energy"] is None else f"{layer['output_energy']:.2e}",
            f"{layer['solver']} {layer['precision']}",
            f"{layer['seconds']:.3f}",
        ]
        for name, layer in report["layers"].items()
    ]
    init = report["init"]
    lines = [f"mode {init['mode']}, power {init['power']:g}, balance {init['balance']}, scale {init['scale']}"]
    lines.append(f"model {report['model']} ({report['fingerprint'][:12]}), attached as {report['attach']}")
    if "selection" in report:
        lines.append(_selection(report["selection"]))
    if "allocation" in report:
        lines.append(_allocation(report["allocation"]))
    return table(headers, rows) + "\n" + "\n".join(lines) + "\n"


def _selection(selection: dict[str, Any]) -> str:
    counts: dict[int, int] = {}
    for index in selection["indices"].values():
        counts[index] = counts.get(index, 0) + 1
    taken = ", ".join(f"{'all' if i == 0 else f'part {i}'} for {n} layers" for i, n in sorted(counts.items()))
    return f"statistics chosen per {selection['per']} (CorDA++, experimental): {taken}"


def _allocation(allocation: dict[str, Any]) -> str:
    ranks = allocation["ranks"].values()
    return (
        f"ranks by {allocation['by']}, mode {allocation['mode']}: {min(ranks)} to {max(ranks)},"
        f" {allocation['parameters']} parameters of a budget of {allocation['budget']}"
    )


def ranks_text(report: dict[str, Any]) -> str:
    """What `corda allocate` decided."""
    rows = [[name, _by(report["shapes"][name]), rank] for name, rank in report["ranks"].items()]
    lines = [_allocation(report)]
    if "selection" in report:
        lines.append(_selection(report["selection"]))
    return table(["layer", "shape", "rank"], rows) + "\n" + "\n".join(lines) + "\n"


def verification_text(report: dict[str, Any]) -> str:
    """Whether an initialization starts at the base model."""
    rows = [
        [name, f"{layer['units']:.3g}", "yes" if layer["holds"] else "NO"] for name, layer in report["layers"].items()
    ]
    verdict = (
        "holds: the start is the base model" if report["holds"] else "DOES NOT HOLD: the start is not the base model"
    )
    limit = "exactly" if report["attach"] == "anchor" else "up to the rounding of its residual weight"
    return (
        table(["layer", "weight differs by (units in the last place)", "holds"], rows)
        + f"\nlogits of {report['tokens']} tokens differ by at most {report['max_difference']:.3g},"
        f" {report['mean_difference']:.3g} in the mean; KL {report['kl']:.3g} nats\n" + f"{verdict}, {limit}\n"
    )


def conversion_text(report: dict[str, Any]) -> str:
    """What `corda convert` kept."""
    rows = [
        [name, layer["rank"], f"{layer['norm']:.3g}", f"{layer['discarded']:.3g}"]
        for name, layer in report["layers"].items()
    ]
    share = report["discarded"] / report["norm"] if report["norm"] else 0.0
    return (
        table(["layer", "rank", "norm of the change", "discarded"], rows)
        + f"\ndiscarded {report['discarded']:.3g} of a change of norm {report['norm']:.3g} ({share:.2%})\n"
    )


def truncation_text(report: dict[str, Any]) -> str:
    """What `corda truncate` took away."""
    rows = [
        [
            name,
            _by(layer["shape"]),
            layer["dropped"],
            layer["kept"],
            "-" if layer["output_error"] is None else f"{layer['output_error']:.2e}",
        ]
        for name, layer in report["layers"].items()
    ]
    return (
        table(["layer", "shape", "dropped", "kept", "output error"], rows)
        + f"\nmethod {report['method']}, power {report['power']:g}; output error: |(W - W') X| / |W X| on the text\n"
    )


def adapter_text(folder: Path) -> str:
    """A LoRA adapter, whoever wrote it."""
    config, layers, scalings, _ = read_adapter(folder)
    anchored = config.init_lora_weights == MARK
    rows = []
    for name, parts in layers.items():
        A, B = parts["lora_A.weight"].double(), parts["lora_B.weight"].double()
        start = (parts["lora_A.anchor"].double(), parts["lora_B.anchor"].double()) if anchored else ()
        norms = [t.norm().item() for t in (*start, A, B)]
        row = [name, f"{B.shape[0]}x{A.shape[1]}", len(A), f"{scalings[name]:.4g}"]
        rows.append([*row, *(f"{norm:.3g}" for norm in norms)])
    kind, norms_of = "plain LoRA", ["|A|", "|B|"]
    if anchored:
        kind = "anchored at A0 and B0, of which D_A and D_B are the changes"
        norms_of = ["|A0|", "|B0|", "|D_A|", "|D_B|"]
    return (
        table(["layer", "shape", "rank", "scaling", *norms_of], rows)
        + f"\n{kind}; base {config.base_model_name_or_path}; {len(layers)} layers\n"
    )


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


TEXTS: dict[str, tuple[Callable[[dict[str, Any]], str], set[str]]] = {
    REPORT: (init_text, {"init", "layers", "attach"}),
    VERIFICATION: (verification_text, {"holds", "max_difference"}),
    RANKS: (ranks_text, {"ranks", "shapes", "budget"}),
    CONVERSION: (conversion_text, {"discarded", "layers"}),
    TRUNCATION: (truncation_text, {"method", "layers"}),
    SUMMARY: (claims_table, {"arms", "claims"}),
}
"""File of a command -> how it is shown, and the fields that tell it from the others."""
