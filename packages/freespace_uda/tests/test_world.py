"""The rendered world: depth that is the ground's, labels that are the road's, the same scene for the same seed."""

import dataclasses
import hashlib

import numpy as np
import pytest
from freespace_uda import RoadWorld
from freespace_uda.world import DOMAINS, Camera


def heights(scene):
    """Height above the road of every pixel with exact depth."""
    k, c, s = scene.camera.intrinsics, np.cos(scene.camera.pitch), np.sin(scene.camera.pitch)
    rows = len(scene.exact)
    v = ((np.arange(rows) - k[1, 2]) / k[1, 1])[:, None]
    return scene.camera.height - scene.exact * (c * v + s), np.broadcast_to(v, scene.exact.shape)


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_road_pixels_lie_on_the_road_and_the_rest_of_the_scene_does_not_have_to(domain):
    world = RoadWorld(domain, (96, 48), 3, 4)
    for i in range(4):
        scene = world[i]
        high, _ = heights(scene)
        road = (scene.label == 1) & (scene.exact > 0)
        assert road.mean() > 0.05
        assert np.abs(high[road]).max() < 0.01
        assert (high[(scene.label == 0) & (scene.exact > 0)] > 0.05).mean() > 0.5


def test_exact_depth_is_the_analytic_ground_plane():
    scene = RoadWorld("roads-flat", (96, 48), 0, 1)[0]
    k, c, s = scene.camera.intrinsics, np.cos(scene.camera.pitch), np.sin(scene.camera.pitch)
    v = ((np.arange(48) - k[1, 2]) / k[1, 1])[:, None]
    plane = np.broadcast_to(scene.camera.height / np.maximum(c * v + s, 1e-9), scene.exact.shape)
    road = (scene.label == 1) & (scene.exact > 0)
    assert np.abs(scene.exact[road] - plane[road]).max() < 1e-3


def digest(scene):
    return hashlib.sha256(scene.rgb.tobytes() + scene.depth.tobytes() + scene.label.tobytes()).hexdigest()


def test_a_seed_gives_one_scene_in_any_order_and_another_seed_another():
    a, b = RoadWorld("roads-real", (64, 32), 5, 9), RoadWorld("roads-real", (64, 32), 5, 3)
    assert digest(a[2]) == digest(b[2])
    assert digest(a[2]) != digest(a[1])
    assert digest(a[2]) != digest(RoadWorld("roads-real", (64, 32), 6, 9)[2])


def test_source_and_target_show_the_same_road_through_the_same_camera():
    camera = Camera(np.array([[80.0, 0, 47.5], [0, 80.0, 20], [0, 0, 1]]), 1.5, 0.02)
    flat, real = (RoadWorld(d, (96, 48), 1, 2).render(1, camera) for d in ("roads-flat", "roads-real"))
    assert np.array_equal(flat.label, real.label)
    assert np.array_equal(flat.exact, real.exact)
    assert not np.array_equal(flat.rgb, real.rgb)


def test_asphalt_and_sidewalk_swap_their_colors():
    flat, real = DOMAINS["roads-flat"], DOMAINS["roads-real"]
    distance = lambda a, b: np.abs(np.subtract(a, b)).sum()  # noqa: E731
    assert distance(real.asphalt, flat.sidewalk) < distance(real.asphalt, flat.asphalt)
    assert distance(real.sidewalk, flat.asphalt) < distance(real.sidewalk, flat.sidewalk)


def test_a_perfect_sensor_gives_exact_depth_and_a_real_one_noise_holes_and_a_limit():
    flat = RoadWorld("roads-flat", (96, 48), 0, 1)[0]
    assert np.array_equal(flat.depth, flat.exact)
    real = RoadWorld("roads-real", (96, 48), 0, 1)[0]
    both = (real.depth > 0) & (real.exact > 0)
    relative = np.abs(real.depth[both] / real.exact[both] - 1)
    assert 0.001 < np.median(relative) < 0.05
    assert real.depth.max() < 75
    assert ((real.exact > 0) & (real.exact < 55) & (real.depth == 0)).mean() > 0.02


def test_a_domain_of_the_users_own_and_wrong_names():
    own = dataclasses.replace(DOMAINS["roads-flat"], height=(0.4, 0.5))
    assert 0.4 <= RoadWorld(own, (64, 32), 0, 1)[0].camera.height <= 0.5
    with pytest.raises(ValueError, match="roads-real"):
        RoadWorld("road-flat")
    with pytest.raises(ValueError, match="8 pixels"):
        RoadWorld("roads-flat", (64, 4))
    with pytest.raises(IndexError):
        RoadWorld("roads-flat", (64, 32), 0, 2)[2]
