"""What commands found, as text for a terminal, layer by layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corda.anchor import is_anchored
from corda.context import ContextStats
from corda.convert import read_adapter
from corda.factors import FactorSet
from tenfold.terminal import table


def stats_text(stats: ContextStats) -> str:
    """Statistics, by groups of layers that share an input."""
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


def factors_text(factors: FactorSet) -> str:
    """Factors on their own, such as the start that a trainer's callback has written."""
    return init_text({**factors.report(), "model": "not recorded", "attach": "not recorded"})


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
    lines.append(f"model {report['model']} ({_short(report['fingerprint'])}), attached as {report['attach']}")
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
        f" {report['mean_difference']:.3g} on average; KL {report['kl']:.3g} nats\n" + f"{verdict}, {limit}\n"
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
    """Any LoRA adapter, ours or another's."""
    config, layers, scalings, _ = read_adapter(folder)
    anchored = is_anchored(config)
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


def _short(fingerprint: str | None) -> str:
    return fingerprint[:12] if fingerprint else "no fingerprint"


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
