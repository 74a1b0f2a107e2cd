"""Many views of one thing: each is edited by itself, and feature gradual sampling lets them read the same references.

    for view, out in edit_views(engine, images, references, SamplingConfig(pool=2), seed=0):
        ...
    update_dataset(engine, 40, references, render_fn, update_fn)     # beside the training of a scene

Shapes: pictures (1, 3, H, W) in [-1, 1], masks (H, W).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold.distributed import rank, split, world_size
from tenfold.randomness import generator
from visctrl.config import SamplingConfig
from visctrl.engine import Reference, VisCtrl
from visctrl.outcome import EditOutput
from visctrl.ranks import gathered
from visctrl.sampling import FeatureGradualSampler

Render = Callable[[int], Tensor]
"""The scene as it is now, seen by a view's camera."""
Update = Callable[[int, Tensor], None]
"""Takes an edited view into the scene: replaces the training picture, and trains on it for a while."""


@dataclass(frozen=True)
class ViewUpdate:
    """What happened to a view in a pass over the scene.

    Attributes:
        number: number of the pass.
        view: number of the view.
        round: the round that its picture is of.
        verdict: why no further round was made; empty where all were.
        rows: pictures that went through the network.
    """

    number: int
    view: int
    round: int
    verdict: str
    rows: int


class _Editor:
    """Edits views with references that may grow in number."""

    def __init__(
        self,
        engine: VisCtrl,
        references: Sequence[Reference],
        sampling: SamplingConfig,
        seed: int,
        prompt: str,
        negative_prompt: str,
    ) -> None:
        if not references:
            raise ValueError("an edit needs at least one reference")
        self.engine = engine
        self.references = list(references)
        self.anchors = len(references)
        self.sampling = sampling
        self.seed = seed
        self.told = engine.conditions(prompt, negative_prompt)
        self._prepare(self.references)

    def _prepare(self, references: Sequence[Reference]) -> None:
        """Invert and record references now, so that what a view costs does not depend on which one is the first."""
        for reference in references:
            for number in range(self.engine.config.rounds):
                self.engine.features(reference, self.engine.config.of_round(number))

    def edit(
        self, view: int, image: Tensor, mask: Tensor | None, number: int = 0, *, sheet: bool = False
    ) -> EditOutput:
        """One view, in pass ``number``."""
        rounds = self.engine.config.rounds
        sampler = FeatureGradualSampler(
            self.sampling, len(self.references), view, self.seed, self.anchors, number * rounds
        )
        return self.engine.edit(
            image, self.references, mask=mask, conditions=self.told, sampler=sampler, history=sheet, provenance=sheet
        )

    def join(
        self, views: Mapping[int, Tensor], images: Sequence[Tensor], masks: Sequence[Tensor | None] | None
    ) -> None:
        """Make edited views references."""
        added = []
        for view, latents in views.items():
            size, mask = images[view].shape[-2:], None if masks is None else masks[view]
            z = latents.to(self.engine.adapter.device)
            added.append(Reference(z, self.told, mask, (size[0], size[1])))
        self._prepare(added)
        self.references += added


def pool_of(views: int, sampling: SamplingConfig, seed: int) -> list[int]:
    """The views that are edited first and then are references, drawn by the seed, in ascending order."""
    order = torch.randperm(views, generator=generator(seed, views)).tolist()
    return sorted(order[: sampling.pool])


def edit_views(
    engine: VisCtrl,
    images: Sequence[Tensor],
    references: Sequence[Reference],
    sampling: SamplingConfig | None = None,
    *,
    masks: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    prompt: str = "",
    negative_prompt: str = "",
    sheets: bool = False,
    made: Mapping[int, Tensor | None] | None = None,
) -> Iterator[tuple[int, EditOutput]]:
    """Edit the views of a scene: first those of the pool, then the others, which may read them.

    In n processes (``visctrl.ranks``) each edits every n-th view from its own number on, with the references recorded once
    per process; the pool's latents are gathered in between.

    Args:
        engine: the engine, whose settings an edit has.
        images: the views; each is asked for when its turn comes, so that the sequence may read files.
        references: the references; view by view in turn they are the anchor.
        sampling: how they enter; default: ``SamplingConfig()``.
        masks: where the subject is in each view.
        seed: seed of what is drawn.
        prompt: what the views then show.
        negative_prompt: what they do not.
        sheets: keep history and provenance.
        made: views that were edited before and are left out; of those in the pool, their latents.

    Yields:
        Number and result of each view of this process's share.

    Raises:
        ValueError: no reference, or a view of the pool was made before and its latents are not given.
        UserError: see ``VisCtrl.edit``.
    """
    sampling, made = sampling or SamplingConfig(), made or {}
    editor = _Editor(engine, references, sampling, seed, prompt, negative_prompt)
    pool = pool_of(len(images), sampling, seed)
    done: dict[int, Tensor] = {}
    for view in split(pool, rank(), world_size()):
        if view not in made:
            out = editor.edit(view, images[view], None if masks is None else masks[view], sheet=sheets)
            yield view, out
            done[view] = out.latents.cpu()
        elif (latents := made[view]) is not None:
            done[view] = latents
        else:
            raise ValueError(f"view {view} is a reference for the others: its latents are needed")
    editor.join(gathered(done), images, masks)
    rest = [view for view in range(len(images)) if view not in pool]
    for view in split(rest, rank(), world_size()):
        if view not in made:
            yield view, editor.edit(view, images[view], None if masks is None else masks[view], sheet=sheets)


def update_dataset(
    engine: VisCtrl,
    views: int,
    references: Sequence[Reference],
    render_fn: Render,
    update_fn: Update,
    sampling: SamplingConfig | None = None,
    *,
    passes: int = 1,
    masks: Sequence[Tensor | None] | None = None,
    seed: int = 0,
    prompt: str = "",
    negative_prompt: str = "",
) -> list[ViewUpdate]:
    """Edit what a scene renders, view by view, and give each result back to the scene before the next one is rendered.

    A view's target is the scene as all edits so far have made it, so that views agree through the scene itself. Each pass
    goes over all views in an order of its own. It is one process's work: what a view shows depends on the one before.

    Args:
        engine: the engine; with one round per edit (``rounds=1``) the passes are the rounds.
        views: how many there are.
        references: the references; view by view in turn they are the anchor.
        render_fn: called with a view's number.
        update_fn: called with the number and the edited picture.
        sampling: how they enter; default: ``SamplingConfig()``. The scene takes the place of a pool.
        passes: how often each view is edited.
        masks: where the subject is in each view.
        seed: seed of order and draws.
        prompt: what the views then show.
        negative_prompt: what they do not.

    Returns:
        What happened, in its order.

    Raises:
        ValueError: no reference, or a pool.
        UserError: see ``VisCtrl.edit``.

    Source: the loop is that of Haque et al., Instruct-NeRF2NeRF, ICCV 2023 (iterative dataset update).
    """
    sampling = sampling or SamplingConfig()
    if sampling.pool:
        raise ValueError("pool: here the scene itself carries edited views to the others; expected 0")
    editor = _Editor(engine, references, sampling, seed, prompt, negative_prompt)
    happened = []
    for number in range(passes):
        for view in torch.randperm(views, generator=generator(seed, views, number)).tolist():
            out = editor.edit(view, render_fn(view), None if masks is None else masks[view], number)
            update_fn(view, out.images)
            happened.append(ViewUpdate(number, view, (out.rounds or [0])[0], (out.verdicts or [""])[0], out.rows))
    return happened
