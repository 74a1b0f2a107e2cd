"""One test over the losses, modules and solvers of all packages: what every method promises, whatever it computes."""

import copy
import dataclasses
import importlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from distributions import ALL, PACKAGES
from torch import Tensor, nn

from tenfold import UserError

ROWS, CLASSES = 6, 3
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])
HALVES = [torch.bfloat16, torch.float16]


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny instance of a public name.

    Attributes:
        package: import name.
        name: of what is tried, with a word where there are several.
        make: a module or a function, with random numbers of the global generator.
        inputs: arguments; tensors of floats are what precision and gradients are about.
        gradients: whether gradients flow; a solver has none.
        tolerance: between 32 and 64 bits, relative to the largest number of an output.
    """

    package: str
    name: str
    make: Callable[[], Callable[..., Any]]
    inputs: Callable[[], tuple[Any, ...]]
    gradients: bool = True
    tolerance: float = 1e-4


def public(package: str, name: str) -> Any:
    return getattr(importlib.import_module(package), name)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape)


def unit(*shape: int) -> Tensor:
    return nn.functional.normalize(rows(*shape), dim=-1)


def positive(n: int) -> Tensor:
    a = rows(n, 4 * n)
    return a @ a.T / (4 * n)


def pckd_outputs(dim: int) -> Any:
    return public("pckd", "Outputs")(rows(ROWS, CLASSES), rows(ROWS, dim), rows(CLASSES, dim))


def pckd_total() -> Callable[..., Any]:
    settings = public("pckd", "PCKDConfig")
    loss = public("pckd", "PCKDLoss")(8, 12, settings())

    class Total(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = loss

        def forward(self, student: Any, teacher: Any, labels: Tensor) -> Tensor:
            return self.loss(student, teacher, labels, epoch=3, epochs=10).total

    return Total()


def local_net() -> Callable[..., Any]:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return public("localrecon", "LocalNet")(model, public("localrecon", "plan_split")(model, rows(ROWS, 8), k=2))


def inverted() -> Callable[..., Any]:
    stepper = public("visctrl", "DDIMStepper")([0.9, 0.6, 0.3], [300.0, 600.0])

    def run(z: Tensor, weight: Tensor) -> Any:
        return public("visctrl", "invert")(lambda x, level, last: torch.tanh(x) * weight, z, stepper).latents

    return run


class Found(nn.Module):
    """Where an aligner finds the points, and what is seen; its hidden layer promises nothing."""

    def __init__(self) -> None:
        super().__init__()
        parts = public("handmstn", "preset")("eeprnet", 8)
        aligner = public("handmstn", "MultiSpatialTransformer")
        self.aligner = aligner(parts, "hand:loc", loc_size=64, votes=1, passes=1).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.aligner(images)
        return found.points, found.visibility


def graph() -> Any:
    building = torch.zeros(5, 5, dtype=torch.bool).numpy()
    building[2, 2:4] = True
    depth = public("radiogat", "radio_depth")(building, [(0, 0)])
    return public("radiogat", "build_graph")(building, depth).adjacency(1750.0)


CASES = [
    Case(
        "corda",
        "factorize, knowledge kept",
        lambda: lambda w, c: public("corda", "factorize")(w, c, 2, public("corda", "CordaInit")(mode="kpm")),
        lambda: (rows(6, 8), positive(8)),
        gradients=False,
        tolerance=1e-3,
    ),
    Case(
        "corda",
        "factorize, instruction first",
        lambda: lambda w, c: public("corda", "factorize")(w, c, 2, public("corda", "CordaInit")(mode="ipm")),
        lambda: (rows(6, 8), positive(8)),
        gradients=False,
        tolerance=1e-3,
    ),
    Case("pckd", "PCKDLoss", pckd_total, lambda: (pckd_outputs(8), pckd_outputs(12), LABELS)),
    Case("pckd", "category_contrast", lambda: public("pckd", "category_contrast"), lambda: (rows(ROWS, 5), LABELS)),
    Case(
        "pckd",
        "kd_per_sample",
        lambda: public("pckd", "kd_per_sample"),
        lambda: (rows(ROWS, CLASSES), rows(ROWS, CLASSES)),
    ),
    Case(
        "pckd",
        "dkd_per_sample",
        lambda: public("pckd", "dkd_per_sample"),
        lambda: (rows(ROWS, CLASSES), rows(ROWS, CLASSES), LABELS),
    ),
    Case(
        "pckd",
        "FeatureAlignLoss",
        lambda: public("pckd", "FeatureAlignLoss")(8, 12, 16),
        lambda: (rows(ROWS, 8), rows(ROWS, 12)),
    ),
    Case("head_kd", "mimic_loss", lambda: public("head_kd", "mimic_loss"), lambda: (rows(ROWS, 5), rows(ROWS, 5))),
    Case(
        "head_kd",
        "pkd_loss",
        lambda: public("head_kd", "pkd_loss"),
        lambda: (rows(2, 4, 5, 5), rows(2, 4, 5, 5)),
    ),
    Case(
        "head_kd",
        "PerAnchorLinear",
        lambda: public("head_kd", "PerAnchorLinear")(3, 5, 4),
        lambda: (rows(ROWS, 5), LABELS),
    ),
    Case("mamba_fscil", "MambaBlock", lambda: public("mamba_fscil", "MambaBlock")(8, 4), lambda: (rows(2, 7, 8),)),
    Case("mamba_fscil", "SS2D", lambda: public("mamba_fscil", "SS2D")(8, 4), lambda: (rows(2, 4, 3, 8),)),
    Case(
        "mamba_fscil",
        "DualSSMProjector",
        lambda: public("mamba_fscil", "DualSSMProjector")(
            8, (3, 3), public("mamba_fscil", "ProjectorConfig")(width=8, states=4)
        ),
        lambda: (rows(2, 8, 3, 3),),
    ),
    Case(
        "mamba_fscil",
        "ETFHead",
        lambda: public("mamba_fscil", "ETFHead")(8, CLASSES, torch.Generator().manual_seed(0)),
        lambda: (rows(ROWS, 8),),
    ),
    Case(
        "mamba_fscil",
        "dot_regression_loss",
        lambda: public("mamba_fscil", "dot_regression_loss"),
        lambda: (rows(ROWS, 8), unit(CLASSES, 8).T, LABELS),
    ),
    Case(
        "mamba_fscil",
        "ClassSensitiveLoss",
        lambda: public("mamba_fscil", "ClassSensitiveLoss")(suppression_novel=0.1),
        lambda: (rows(ROWS, 4, 8), (rows(ROWS, 3), rows(ROWS, 4), rows(ROWS, 4)), LABELS, 2),
    ),
    Case("localrecon", "LocalNet", local_net, lambda: (rows(ROWS, 8),)),
    Case(
        "localrecon",
        "BPFreeLinear",
        lambda: public("localrecon", "BPFreeNet")([public("localrecon", "BPFreeLinear")(8, 5, CLASSES)]),
        lambda: (rows(ROWS, 8),),
        gradients=False,
    ),
    Case(
        "genview",
        "QDNTXentLoss",
        lambda: public("genview", "QDNTXentLoss")(),
        lambda: (rows(ROWS, 8), rows(ROWS, 8), torch.rand(ROWS) + 0.5),
    ),
    Case(
        "genview",
        "QDMoCoLoss",
        lambda: public("genview", "QDMoCoLoss")(8, 12),
        lambda: (unit(ROWS, 8), unit(ROWS, 8), torch.rand(ROWS) + 0.5),
    ),
    Case(
        "genview",
        "QDMoCoV3Loss",
        lambda: public("genview", "QDMoCoV3Loss")(),
        lambda: (rows(ROWS, 8), rows(ROWS, 8), torch.rand(ROWS) + 0.5),
    ),
    Case(
        "genview",
        "QDNegativeCosine",
        lambda: public("genview", "QDNegativeCosine")(),
        lambda: (rows(ROWS, 8), rows(ROWS, 8), torch.rand(ROWS) + 0.5),
    ),
    Case(
        "genview",
        "QDSwAVLoss",
        lambda: public("genview", "QDSwAVLoss")(),
        lambda: ([rows(ROWS, 4), rows(ROWS, 4)], [rows(ROWS, 4)], torch.rand(ROWS) + 0.5),
    ),
    Case(
        "genview",
        "QDMultiPositiveLoss",
        lambda: public("genview", "QDMultiPositiveLoss")(),
        lambda: (rows(ROWS, 8), LABELS),
    ),
    Case(
        "genview",
        "image_text_qd_loss",
        lambda: public("genview", "image_text_qd_loss"),
        lambda: (unit(ROWS, 8), unit(ROWS, 8), torch.tensor(10.0), torch.rand(ROWS) + 0.5),
    ),
    Case(
        "genview",
        "pair_quality",
        lambda: lambda a, b, u: public("genview", "pair_quality")(a, b, u).q,
        lambda: (rows(ROWS, 9, 8), rows(ROWS, 9, 8), unit(8)),
        gradients=False,
    ),
    Case(
        "genview",
        "pair_weights",
        lambda: public("genview", "pair_weights"),
        lambda: (rows(ROWS),),
        gradients=False,
    ),
    Case("visctrl", "invert", inverted, lambda: (rows(2, 4, 3, 3), torch.tensor(0.5)), gradients=False),
    Case(
        "radiogat", "GraphAttention", lambda: public("radiogat", "GraphAttention")(6, 4), lambda: (rows(23, 6), graph())
    ),
    Case(
        "radiogat",
        "RadioGATx",
        lambda: public("radiogat", "RadioGATx")(5, 3),
        lambda: (rows(ROWS, 4, 5), rows(ROWS, 3), rows(ROWS, 4), 10 * rows(ROWS, 4) - 80, 0.1 * rows(ROWS)),
    ),
    Case(
        "handmstn",
        "ControlPointGrid",
        lambda: public("handmstn", "ControlPointGrid")(public("handmstn", "preset")("eeprnet", 8)),
        lambda: (rows(2, 9, 2),),
    ),
    Case(
        "handmstn",
        "MultiSpatialTransformer",
        Found,
        lambda: (torch.rand(2, 3, 64, 64),),
        tolerance=1e-3,
    ),
    Case(
        "handmstn",
        "ArcMarginHead",
        lambda: public("handmstn", "ArcMarginHead")(CLASSES, 8),
        lambda: (rows(ROWS, 8), LABELS),
    ),
    Case(
        "handmstn",
        "SoftmaxHead",
        lambda: public("handmstn", "SoftmaxHead")(CLASSES, 8),
        lambda: (rows(ROWS, 8), LABELS),
    ),
    Case(
        "handmstn",
        "BatchHardTriplet",
        lambda: public("handmstn", "BatchHardTriplet")(),
        lambda: (rows(ROWS, 8), LABELS),
    ),
    Case(
        "handmstn",
        "CenterLoss",
        lambda: public("handmstn", "CenterLoss")(CLASSES, 8),
        lambda: (rows(ROWS, 8), LABELS),
    ),
    Case(
        "freespace_uda",
        "SurfaceNormals",
        lambda: public("freespace_uda", "SurfaceNormals")(),
        lambda: (
            10 + torch.rand(1, 1, 12, 16),
            torch.tensor([[[20.0, 0.0, 8.0], [0.0, 20.0, 6.0], [0.0, 0.0, 1.0]]]),
        ),
        tolerance=1e-3,
    ),
    Case(
        "freespace_uda",
        "CrossGuidance",
        lambda: public("freespace_uda", "CrossGuidance")((8, 8)),
        lambda: (rows(2, 8, 4, 5), rows(2, 8, 4, 5), torch.ones(2, 1, 4, 5)),
    ),
    Case(
        "freespace_uda",
        "SelectiveAlignment",
        lambda: public("freespace_uda", "SelectiveAlignment")({"rgb": 8, "normal": 8}, min_pixels=1, hidden=8),
        lambda: (
            {"rgb": rows(2, 8, 4, 5), "normal": rows(2, 8, 4, 5)},
            {"rgb": rows(2, 8, 4, 5), "normal": rows(2, 8, 4, 5)},
            torch.ones(2, 1, 4, 5),
            {"rgb": torch.ones(2, 1, 4, 5), "normal": torch.ones(2, 1, 4, 5)},
        ),
    ),
    Case(
        "freespace_uda",
        "FreespaceNet",
        lambda: public("freespace_uda", "FreespaceNet")(width=8).eval(),
        lambda: (torch.rand(1, 3, 64, 64), unit(1, 64, 64, 3).permute(0, 3, 1, 2), torch.ones(1, 1, 64, 64)),
        tolerance=1e-3,
    ),
]


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of floats in what a method takes or gives."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments with every tensor of floats changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: changed(each, change) for name, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(changed(each, change) for each in value))
    if isinstance(value, list | tuple):
        return type(value)(changed(each, change) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and list(tensors(value)):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return type(value)(**{name: changed(getattr(value, name), change) for name in names})
    return value


def made(case: Case, seed: int = 0) -> Callable[..., Any]:
    torch.manual_seed(seed)
    return case.make()


def given(case: Case, seed: int = 1) -> tuple[Any, ...]:
    torch.manual_seed(seed)
    return case.inputs()


def module_of(case: Case) -> nn.Module:
    method = made(case)
    if not isinstance(method, nn.Module):
        pytest.skip("a function has no state")
    return method


def outputs(method: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    found = list(tensors(method(*arguments)))
    assert found
    return found


HERE = [case for case in CASES if case.package in {package.import_name for package in PACKAGES}]


@pytest.fixture(params=HERE, ids=lambda case: f"{case.package}-{case.name}")
def case(request):
    return request.param


def test_every_package_is_here():
    assert {case.package for case in CASES} == {package.import_name for package in ALL if package.is_package}


def test_the_same_seed_gives_the_same_numbers(case):
    first, second = (outputs(made(case), given(case)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_are_finite_and_arrive(case):
    if not case.gradients:
        pytest.skip("a solver: nothing flows back through it")
    method = made(case)
    arguments = changed(given(case), lambda t: t.clone().requires_grad_(True))
    total = sum(
        (each.double().square().sum() for each in outputs(method, arguments) if each.requires_grad),
        start=torch.zeros((), dtype=torch.float64),
    )
    total.backward()
    leaves = [*tensors(arguments), *(method.parameters() if isinstance(method, nn.Module) else ())]
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_a_state_dict_carries_everything_over(case):
    method = module_of(case)
    other = made(case, seed=7)
    other.load_state_dict(method.state_dict())
    expected, found = outputs(method, given(case)), outputs(other, given(case))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_sixty_four_bits_agree_with_thirty_two(case):
    method = made(case)
    wide = copy.deepcopy(method).double() if isinstance(method, nn.Module) else method
    arguments = given(case)
    single, double = outputs(method, arguments), outputs(wide, changed(arguments, Tensor.double))
    for a, b in zip(single, double, strict=True):
        scale = max(float(b.detach().abs().max()), 1e-6)
        assert float((a.double() - b.double()).abs().max()) <= case.tolerance * scale


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
def test_half_precision_is_accepted_or_refused_in_one_line(case, dtype):
    """Accepted: finite, and near the same numbers in 32 bits. Refused: by an error of ours, before anything is computed."""
    method = made(case)
    half = copy.deepcopy(method).to(dtype) if isinstance(method, nn.Module) else method
    arguments = changed(given(case), lambda t: t.to(dtype))
    try:
        found = outputs(half, arguments)
    except (UserError, ValueError, TypeError) as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert "\n" not in refusal
        assert any(word in refusal for word in ("precision", "bit", "float", "half", str(dtype)))
        return
    for a, b in zip(found, outputs(method, changed(arguments, Tensor.float)), strict=True):
        assert a.isfinite().all()
        assert float((a.float() - b).abs().max()) <= 0.1 * max(float(b.detach().abs().max()), 1.0)


def settings_of(package: str) -> list[type]:
    module = importlib.import_module(f"{package}.config")
    found = [value for value in vars(module).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]
    return [value for value in found if value.__module__ == module.__name__]


@pytest.mark.parametrize("package", [package.import_name for package in PACKAGES])
def test_settings_survive_copies_and_pickles(package):
    tried = 0
    for kind in settings_of(package):
        needed = [
            field
            for field in dataclasses.fields(kind)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
        if needed:
            continue
        try:
            settings = kind()
        except UserError:  # of several options one has to be given
            continue
        assert copy.deepcopy(settings) == settings
        assert pickle.loads(pickle.dumps(settings)) == settings
        tried += 1
    assert tried
