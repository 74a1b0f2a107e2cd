"""One arm of a comparison: the net that a method's name and the settings make.

Back-propagation is the net of one module; checkpointing and accumulation are ways to run it. So all arms differ in nothing
else.
"""

import copy
import dataclasses
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from localrecon.boundary import StepOptions
from localrecon.config import Feedback, HeadSpec, Method, OptimizerSettings, SGRConfig, SplitSettings
from localrecon.inputs import Inputs
from localrecon.models import DataForm, build_bpfree, build_model
from localrecon.net import LocalNet
from localrecon.optimizers import Net, make_optimizers, optimizer_of, state_bytes
from localrecon.plan import SplitPlan
from localrecon.profiling import plan_split
from localrecon.trainer import train_step
from tenfold import UserError
from tenfold.memory import MemoryProbe
from tenfold.randomness import keyed

WHOLE = ("bp", "ckpt", "accum")
"""Methods that do not cut the model."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """A net that is ready to be trained.

    Attributes:
        net: the net.
        sgr: its reconciliation.
        accumulate: parts that a batch is computed in.
    """

    net: Net
    sgr: SGRConfig
    accumulate: int


def first_batch(items: Dataset[Any], count: int) -> tuple[Inputs, Tensor]:
    """The first ``count`` items as one batch; what they draw at random is keyed."""
    with keyed(0):
        inputs, labels = next(iter(DataLoader(items, batch_size=count)))
    return inputs, labels


def split_of(settings: SplitSettings, model: nn.Module, sample: Inputs, sgr: SGRConfig) -> SplitPlan:
    """The split that the settings ask for, measured on a batch of inputs."""
    return plan_split(
        model,
        sample,
        k=settings.k,
        budget=settings.budget,
        balance=settings.balance,
        cuts=settings.cuts,
        adapter=settings.adapter,
        heads=settings.head,
        sgr=sgr,
        optimizer_states=partial(state_bytes, settings.optimizer.name),
    )


def run_as(
    method: str,
    model: nn.Module,
    plan: SplitPlan,
    heads: HeadSpec | None = None,
    seed: int | None = None,
    *,
    checkpointing: bool = False,
) -> LocalNet:
    """The net of a method other than bpfree: with ``ckpt``, in checkpointed segments of sqrt(N) blocks.

    With ``checkpointing``, so is each module of a net of several.
    """
    net = LocalNet(model, plan, heads or HeadSpec(), seed=seed)
    if method == "ckpt" or checkpointing:
        for stage in net.segments:
            stage.checkpointing = stage.checkpointed_blocks()
    return net


def build_arm(
    settings: SplitSettings,
    method: Method,
    form: DataForm,
    items: Dataset[Any] | None,
    seed: int,
    *,
    accumulate: int = 1,
    feedback: Feedback = "transpose",
    plan: SplitPlan | None = None,
) -> Arm:
    """Model, split and heads of one arm; weights depend on the seed alone, and are the same for all methods but bpfree.

    Args:
        settings: model, split, heads and reconciliation.
        method: name of the method.
        form: what the model has to know of its data.
        items: training items, a batch of which decides the split; None where the plan is given and weights are loaded,
            also in place of pretrained ones.
        seed: seed of the weights.
        accumulate: parts that a batch is computed in.
        feedback: feedback of bpfree.
        plan: a plan that was made before, in place of making one.

    Raises:
        UserError: model, data, heads and split do not go together.
    """
    if method == "bpfree":
        with keyed(seed):
            return Arm(build_bpfree(settings, form, feedback), settings.sgr, 1)
    with keyed(seed):
        model = build_model(settings, form, pretrained=items is not None)
    sgr = settings.sgr if method == "sgr" else dataclasses.replace(settings.sgr, lam=0.0)
    if plan is None:
        if items is None:
            raise UserError("the plan of this run is missing")
        sample = first_batch(items, settings.batch_size)[0]
    if plan is None and method in WHOLE:
        plan = plan_split(model, sample, k=1, adapter=settings.adapter, measure=False)
    elif plan is None:
        plan = split_of(settings, model, sample, sgr)
    again = settings.checkpointing and method in {"local", "sgr"}
    net = run_as(method, model, plan, settings.head, seed, checkpointing=again)
    return Arm(net, sgr, max(accumulate, settings.k) if method == "accum" else accumulate)


def peak_bytes(arm: Arm, optimizer: OptimizerSettings, batch: tuple[Inputs, Tensor], seed: int) -> int:
    """Peak bytes of live tensors in a step, on a copy: parameters, heads, gradients, states, batch and activations."""
    net = copy.deepcopy(arm.net).train()
    optimizers = make_optimizers(net, partial(optimizer_of, optimizer))
    sgr = dataclasses.replace(arm.sgr, ramp=0.0)
    options = StepOptions(seed=seed, accumulate=arm.accumulate)
    inputs, labels = batch
    train_step(net, inputs, labels, optimizers, sgr, options)
    with MemoryProbe(net, optimizers, batch) as probe:
        train_step(net, inputs, labels, optimizers, sgr, options)
    return probe.peak_bytes
