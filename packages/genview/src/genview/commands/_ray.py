"""Generation on a Ray cluster: units of one level as tasks of actors that hold the pipeline.

Ray's own retries and scaling; nothing is scheduled here. Each actor is a worker with a part of its own in the folder of views,
which all nodes have to see under the same path. A unit that is tried again makes only what is not there.
"""

import logging
import os
import uuid
from collections.abc import Mapping
from typing import Any

from genview import runner
from genview.commands import _files
from genview.config import GenerateSettings, PlanSettings
from genview.data import load
from genview.generators import load_generator
from genview.plans import Plan
from genview.store import ViewStore
from tenfold import UserError, runs
from tenfold.devices import choose_device
from tenfold.errors import needs
from tenfold.terminal import track

RETRIES = 3
"""Times that a unit is tried again, and that an actor is started again, after its process has died."""


class Worker:
    """What an actor holds: plan, generator, pictures, its own part of the folder."""

    def __init__(self, settings: Mapping[str, Any], head: Mapping[str, Any], home: str) -> None:
        if os.path.isdir(home):
            os.chdir(home)  # relative names mean what they mean to the person
        chosen = GenerateSettings(**settings)
        self.size = chosen.batch_size
        self.plan = Plan.read(chosen.plan)
        self.units = {unit[0].unit: unit for unit in self.plan.units()}
        generator = load_generator(
            chosen.kind,
            chosen.generator,
            adapter=chosen.adapter,
            device=choose_device(chosen.device),
            dtype=chosen.dtype,
            steps=chosen.steps,
            size=chosen.size,
        )
        self.generator = generator
        pictures = None
        if generator.needs == "picture" or self.plan.embeddings is None:
            planned = runs.read(chosen.plan, PlanSettings, package="genview", verb="plan").settings
            pictures = load(planned.data).train

        def read(i: int) -> Any:
            assert pictures is not None
            return _files.as_tensor(pictures.read(i))

        self.conditions = runner.embeddings_or_pictures(self.plan, generator, read)
        self.store = ViewStore.open(chosen.views, head=head, part=_part())
        self.done = self.store.done()  # once: a unit is no other actor's, and an actor that is started again reads anew

    def unit(self, number: int) -> tuple[int, int]:
        """Make what is missing of one unit; returns how many were made and how many failed."""
        made = failed = 0
        for batch in runner.batches([self.units[number]], self.done, self.size):
            one, other = runner.make_batch(batch, self.store, self.generator, self.conditions)
            made, failed = made + one, failed + other
        return made, failed


def run(plan: Plan, settings: GenerateSettings, head: Mapping[str, Any], *, quiet: bool = False) -> tuple[int, int]:
    """Make all units on a cluster; returns how many views were made and how many failed.

    Raises:
        MissingExtraError: Ray is not installed.
        UserError: no head node at that address, views of something else, a fault of a worker that the user can mend, or a
            worker that dies too often.
    """
    needs("ray", "ray", "genview", why="--engine ray")
    import ray
    from ray.util import ActorPool

    if not ray.is_initialized():
        address = settings.ray_address or os.environ.get("RAY_ADDRESS")
        here: dict[str, Any] = {} if address else {"num_cpus": settings.ray_workers}
        try:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **here)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = f"no head node of Ray answers at {address}" if address else "Ray does not start here"
            raise UserError(f"--ray_address: {where} ({error})") from error
    with ViewStore.open(
        settings.views, head=head, part=_part()
    ) as store:  # another head is refused before anything starts
        failed = runner.record_errors(plan, store)
    actor = ray.remote(num_cpus=1, max_restarts=RETRIES, max_task_retries=RETRIES)(Worker)
    gpus = 1 if choose_device(settings.device) == "cuda" else 0
    values = {name: getattr(settings, name) for name in vars(settings)}
    values |= {"plan": os.path.abspath(settings.plan), "views": os.path.abspath(settings.views)}
    group = uuid.uuid4().hex[:8]
    workers = [
        actor.options(num_gpus=gpus, name=f"genview-{group}-{i}").remote(values, dict(head), os.getcwd())
        for i in range(settings.ray_workers)
    ]
    numbers = [unit[0].unit for unit in plan.units()]
    results = ActorPool(workers).map_unordered(lambda worker, number: worker.unit.remote(number), numbers)
    made = 0
    try:
        for one, other in track(results, "units", total=len(numbers), quiet=quiet):
            made, failed = made + one, failed + other
    except (ray.exceptions.RayTaskError, ray.exceptions.RayActorError) as error:
        if (told := user_fault(error)) is None:
            raise
        raise UserError(told) from error
    finally:
        for worker in workers:
            ray.kill(worker)
    return made, failed


def _part() -> str:
    return f"ray-{uuid.uuid4().hex[:12]}"


def user_fault(error: Any) -> str | None:
    """What the user can mend of a worker's error: a UserError's own words, or that it died too often; else nothing."""
    if isinstance(cause := getattr(error, "cause", None), UserError):
        return str(cause)
    lines = str(error).splitlines()
    own = [line.partition("UserError: ")[2] for line in lines if "UserError: " in line]
    if own:
        return own[-1]
    if getattr(error, "actor_init_failed", True):
        return None
    why = " ".join(line.strip() for line in lines)[:300]
    return f"a worker died more than {RETRIES} times; the same command makes what is missing ({why})"
