"""Many views of one thing: what is drawn, what a draw does to an edit, and the scene whose refit measures agreement."""

import collections
import dataclasses

import numpy as np
import pytest
import torch
from visctrl.config import SamplingConfig, VisCtrlConfig
from visctrl.engine import VisCtrl
from visctrl.errors import ShapeMismatchError
from visctrl.inversion import Trajectory
from visctrl.points import DISTANCE, FOCAL, SIZE, make_scene, trainer
from visctrl.sampling import FeatureGradualSampler, mix_latents
from visctrl.steppers import FlowStepper
from visctrl.views import edit_views, pool_of, update_dataset
from visctrl_tiny import ddim, picture, sd, tiny_unconditional

CONFIG = VisCtrlConfig(steps=4, start=0.5, layers="0:", rounds=2, refine=2, guard=False)


@pytest.fixture(scope="module")
def engine():
    return VisCtrl(tiny_unconditional(in_channels=3, out_channels=3, sample_size=16), CONFIG, scheduler=ddim())


def sampler(engine, kind="feature", references=2, view=0, seed=0, **changes):
    return FeatureGradualSampler(SamplingConfig(kind=kind, **changes), references, view, seed)


def test_what_is_drawn_depends_on_seed_round_view_and_step_alone_and_is_uniform():
    config = SamplingConfig(alpha=0.25)
    draws = {
        (r, v, k): FeatureGradualSampler(config, 3, v, 7).draw(r, k)
        for r in range(5)
        for v in range(20)
        for k in range(9)
    }
    for (r, v, k), found in reversed(draws.items()):
        assert FeatureGradualSampler(config, 3, v, 7).draw(r, k) == found
        assert found[0] == (v % 3, 0.25 if len(found) == 2 else 1.0)
        assert sum(weight for _, weight in found) == 1
    counts = collections.Counter(found[-1][0] for found in draws.values())
    assert max(abs(count / len(draws) - 1 / 3) for count in counts.values()) < 0.05
    assert draws != {(r, v, k): FeatureGradualSampler(config, 3, v, 8).draw(r, k) for r, v, k in draws}
    later = FeatureGradualSampler(config, 3, 4, 7, first_round=3)
    assert [later.draw(1, k) for k in range(9)] == [draws[4, 4, k] for k in range(9)]


def test_a_single_reference_per_view_is_drawn_once():
    found = [FeatureGradualSampler(SamplingConfig(kind="single"), 4, view, 0) for view in range(40)]
    assert all(x.draw(0, 0) == x.draw(3, 2) == [(x.anchor, 1.0)] for x in found)
    assert len({x.anchor for x in found}) == 4


@pytest.mark.parametrize("kind", ["feature", "latent"])
def test_with_one_reference_or_alpha_one_a_view_is_the_edit_with_its_own_reference_bit_for_bit(engine, kind):
    references = [engine.reference(picture(i)) for i in (1, 2)]
    want = engine.edit(picture(0), references[1])
    got = engine.edit(picture(0), references, sampler=sampler(engine, kind, view=1, alpha=1.0))
    assert torch.equal(got.latents, want.latents)
    got = engine.edit(picture(0), references[1:], sampler=sampler(engine, kind, references=1))
    assert torch.equal(got.latents, want.latents)


@pytest.mark.parametrize("bank", ["memory", "stream"])
@pytest.mark.parametrize("kind", ["feature", "latent"])
def test_equal_references_make_alpha_and_seed_irrelevant(engine, kind, bank):
    engine = VisCtrl(engine.adapter, dataclasses.replace(CONFIG, bank=bank, refine=1))  # recorded at the latents
    references = [engine.reference(picture(1)) for _ in range(3)]
    want = engine.edit(picture(0), references[0]).latents
    for seed, alpha in ((0, 0.5), (1, 0.2)):
        got = engine.edit(picture(0), references, sampler=sampler(engine, kind, 3, 1, seed, alpha=alpha)).latents
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def always_two(alpha, kind="feature"):
    """A sampler that reads both of two references in the injected steps of two rounds of four steps."""
    for seed in range(200):
        found = FeatureGradualSampler(SamplingConfig(kind=kind, alpha=alpha), 2, 0, seed)
        if all(len(found.draw(r, k)) == 2 for r in range(2) for k in (2, 3)):
            return found
    raise AssertionError("no seed")


def test_a_weight_of_two_thirds_is_a_reference_that_stands_there_twice(engine):
    a, b = (engine.reference(picture(i)) for i in (1, 2))
    want = engine.edit(picture(0), [a, a, b]).latents
    got = engine.edit(picture(0), [a, b], sampler=always_two(2 / 3)).latents
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (got - engine.edit(picture(0), [a, b]).latents).abs().max() > 1e-4


def test_mixed_latents_are_read_at_their_own_noise_level(engine):
    engine = VisCtrl(engine.adapter, dataclasses.replace(CONFIG, refine=1))
    a, b = (engine.reference(picture(i)) for i in (1, 2))
    alone = [engine.edit(picture(0), x).latents for x in (a, b)]
    mixed = engine.edit(picture(0), [a, b], sampler=always_two(0.5, "latent")).latents
    nearly = engine.edit(picture(0), [a, b], sampler=always_two(1 - 1e-6, "latent")).latents
    assert min((mixed - x).abs().max() for x in alone) > 1e-4
    assert (nearly - alone[0]).abs().max() < 1e-3


def trajectory(clean, noise, stepper, level):
    signal, spread = stepper.scales(level)
    latents = [clean, *(clean for _ in range(level - 1)), signal * clean + spread * noise]
    return Trajectory(latents, [], [], torch.zeros(0, 1, 1), torch.zeros(0, 1, dtype=torch.bool))


@pytest.mark.parametrize("alpha", [0.5, 0.2, 0.9])
def test_mixed_latents_keep_the_noise_at_unit_variance_and_mix_the_clean_part(alpha):
    stepper, level = FlowStepper([0.0, 0.3, 0.6, 1.0], [300.0, 600.0, 1000.0]), 2
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1, 1, 316, 317, generator=g, dtype=torch.float64)
    clean = torch.tensor([2.0, -1.0], dtype=torch.float64).view(2, 1, 1, 1, 1).expand_as(noise)
    parts = [trajectory(clean[i], noise[i], stepper, level) for i in range(2)]
    got = mix_latents(stepper, level, *parts, alpha)
    signal, spread = stepper.scales(level)
    rest = (got - signal * (alpha * 2.0 - (1 - alpha))) / spread
    assert rest.var() == pytest.approx(1, abs=0.01)
    assert rest.mean() == pytest.approx(0, abs=0.01)
    assert torch.allclose(mix_latents(stepper, level, parts[0], parts[0], alpha), parts[0].latents[level])
    other = trajectory(clean[0, ..., :9], noise[0, ..., :9], stepper, level)
    with pytest.raises(ShapeMismatchError, match="two sizes"):
        mix_latents(stepper, level, parts[0], other, alpha)


@pytest.mark.parametrize("kind", ["feature", "latent"])
def test_prompted_and_guided_models_sample_gradually_too(tmp_path, kind):
    pipe = sd(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    engine = VisCtrl(pipe, dataclasses.replace(CONFIG, guidance_rows="match", inversion_guidance=None, refine=1))
    references = [engine.reference(picture(i), "a") for i in (1, 2)]
    alone = [engine.edit(picture(0), x, prompt="b").latents for x in references]
    got = engine.edit(picture(0), references, prompt="b", sampler=always_two(0.5, kind)).latents
    assert torch.isfinite(got).all()
    assert min((got - x).abs().max() for x in alone) > 1e-4


def test_views_are_edited_as_by_hand_and_those_of_the_pool_first(engine):
    images = [picture(10 + i) for i in range(4)]
    references = [engine.reference(picture(i)) for i in (1, 2)]
    sampling = SamplingConfig(pool=1)
    (first,) = pool_of(4, sampling, 5)
    found = dict(edit_views(engine, images, references, sampling, seed=5))
    assert list(found) == [first, *(i for i in range(4) if i != first)]
    assert [x.inversions for x in references] == [1, 1]
    alone = engine.edit(images[first], references, sampler=FeatureGradualSampler(sampling, 2, first, 5, 2))
    assert torch.equal(found[first].latents, alone.latents)
    edited = dataclasses.replace(engine.reference(images[first]), latents=alone.latents)
    for view in set(range(4)) - {first}:
        again = FeatureGradualSampler(sampling, 3, view, 5, 2)
        want = engine.edit(images[view], [*references, edited], sampler=again)
        assert torch.equal(found[view].latents, want.latents)
    rest = dict(edit_views(engine, images, references, sampling, seed=5, made={first: alone.latents, 3: None}))
    assert set(rest) == set(range(4)) - {first, 3}
    assert all(torch.equal(out.latents, found[view].latents) for view, out in rest.items())
    with pytest.raises(ValueError, match="its latents are needed"):
        list(edit_views(engine, images, references, sampling, seed=5, made={first: None}))
    with pytest.raises(ValueError, match="at least one reference"):
        list(edit_views(engine, images, []))


def test_an_updated_dataset_is_rendered_anew_for_every_view(engine):
    scene = make_scene(0, views=3, points=12)
    colors = torch.full((len(scene.points), 3), 0.2)
    once = VisCtrl(engine.adapter, dataclasses.replace(CONFIG, rounds=1))
    references = [once.reference(torch.nn.functional.interpolate(picture(i), 32)) for i in (1, 2)]
    render, update = trainer(scene, colors)
    seen = []

    def rendered(view):
        seen.append((view, render(view)))
        return seen[-1][1]

    happened = update_dataset(once, 3, references, rendered, update, passes=2, seed=3)
    assert [(x.number, x.view) for x in happened] == [(i // 3, view) for i, (view, _) in enumerate(seen)]
    assert [sorted(view for view, _ in seen[i : i + 3]) for i in (0, 3)] == [list(range(3))] * 2
    images, now = scene.render(colors), colors
    for place, (view, shown) in enumerate(seen):  # the loop written out
        assert torch.equal(shown, scene.view(now, view))
        drawn = FeatureGradualSampler(SamplingConfig(), 2, view, 3, 2, place // 3)
        images[view] = once.edit(shown, references, sampler=drawn).images[0]
        now, _ = scene.refit(images)
    assert torch.equal(render(0), scene.view(now, 0))
    assert (now - colors).abs().max() > 1e-3
    with pytest.raises(ValueError, match="pool"):
        update_dataset(once, 3, references, render, update, SamplingConfig(pool=1))


@pytest.mark.parametrize("views", [6, 12])
def test_a_camera_sees_a_point_where_it_projects_to_unless_a_ball_is_before_it(views):
    scene = make_scene(4, views)
    weights = scene.weights.numpy()
    assert weights.sum(axis=-1).max() <= 1 + 1e-6
    middles = np.stack([scene.points[scene.balls == b].mean(axis=0) for b in range(3)])
    radii = [np.linalg.norm(scene.points[scene.balls == b] - middles[b], axis=1).mean() for b in range(3)]
    checked = 0
    for eye, seen in zip(scene.eyes, weights, strict=True):
        assert np.linalg.norm(eye) == pytest.approx(DISTANCE)
        ahead = -eye / DISTANCE
        right = np.cross(ahead, [0, 0, 1])
        right /= np.linalg.norm(right)
        down = np.cross(ahead, right)
        for p, (point, ball) in enumerate(zip(scene.points, scene.balls, strict=True)):
            away = point - eye
            facing = (point - middles[ball]) @ -away / np.linalg.norm(away) / radii[ball]
            unit = away / np.linalg.norm(away)
            before = any(
                np.linalg.norm(np.cross(middles[b] - eye, unit)) < radii[b] + 0.1 and (middles[b] - point) @ unit < 0
                for b in range(3)
                if b != ball
            )
            x, y = (FOCAL * (away @ axis) / (away @ ahead) + 0.5 for axis in (right, down))
            if facing > 0.5 and not before and 0 < x < 1 and 0 < y < 1:
                assert seen[int(y * SIZE), int(x * SIZE), p] > 0
                checked += 1
            if facing < -0.3:
                assert seen[..., p].sum() == 0
    assert checked > 8 * views


def test_a_refit_gives_back_colors_that_views_agree_on_and_the_size_of_what_they_do_not():
    scene = make_scene(1)
    colors = torch.rand(len(scene.points), 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, residual = scene.refit(scene.render(colors))
    seen = scene.weights.sum(dim=(0, 1, 2)) > 1
    assert residual < 1e-6
    assert (found - colors)[seen].abs().max() < 1e-4
    tinted = scene.render(colors) + torch.linspace(-0.2, 0.2, 6).view(6, 1, 1, 1)
    rows, wanted = [], []
    for v in range(6):  # the system written out, pixel by pixel
        for y in range(SIZE):
            for x in range(SIZE):
                w = scene.weights[v, y, x].double().numpy()
                if w.sum() >= 0.5:
                    rows.append(w)
                    wanted.append(tinted[v, :, y, x].double().numpy() - (1 - w.sum()) * 0.97)
    solution = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
    want = np.sqrt(np.mean((np.array(rows) @ solution - np.array(wanted)) ** 2))
    _, got = scene.refit(tinted)
    assert got == pytest.approx(want, rel=1e-6)
    assert 0.02 < got < 0.2
