"""`genview generate`: one worker of a generation, or a cluster of them."""

import sys

import torch

from genview import runner
from genview.commands import _files, _ray
from genview.config import GenerateSettings, PlanSettings
from genview.data import load
from genview.generators import load_generator
from genview.plans import Plan
from genview.store import ViewStore
from tenfold import UserError, runs
from tenfold.cli import Invocation
from tenfold.devices import choose_device
from tenfold.terminal import track


def run(settings: GenerateSettings, invocation: Invocation) -> None:
    """Make what is not there yet of this worker's share."""
    planned = runs.read(settings.plan, PlanSettings, package="genview", verb="plan").settings
    plan = Plan.read(settings.plan)
    device = choose_device(settings.device)
    generator = load_generator(
        settings.kind,
        settings.generator,
        adapter=settings.adapter,
        device=device,
        dtype=settings.dtype,
        steps=settings.steps,
        size=settings.size,
    )
    fixed = {name: getattr(settings, name) for name in ("steps", "size", "store", "format", "quality")}
    fixed["pipeline"] = settings.kind
    head = runner.head_of(plan, generator, fixed)
    if settings.engine == "ray":
        made, failed = _ray.run(plan, settings, head, quiet=invocation.quiet)
    else:
        shard = runner.shard_of(settings.shard)
        part = f"shard-{shard[0]}-of-{shard[1]}"
        pictures = None
        if generator.needs == "picture" or plan.embeddings is None:
            pictures = load(planned.data).train

        def read(i: int) -> torch.Tensor:
            assert pictures is not None
            return _files.as_tensor(pictures.read(i))

        conditions = runner.embeddings_or_pictures(plan, generator, read)
        with ViewStore.open(settings.views, head=head, part=part) as store:
            made, failed = runner.run_shard(
                plan,
                store,
                generator,
                conditions,
                shard=shard,
                batch_size=settings.batch_size,
                show=lambda batches: track(batches, part, quiet=invocation.quiet),
            )
    invocation.folder.write_json("generated.json", {"made": made, "failed": failed, "generator": generator.id})
    if not made and not failed:
        sys.stdout.write(f"{settings.views}: all views of this share are there\n")
        return
    if failed and not made:
        raise UserError(f"{settings.views}: none of {failed} views could be made; genview status tells why")
    sys.stdout.write(f"{made} views made, {failed} failed; {settings.views}\n")
