"""The tiny denoiser: its closed-form part against linear algebra, its folder, its training."""

import numpy as np
import pytest
import torch
from genview import tiny
from genview.generators import UnCLIPGenerator
from genview.sketch import SketchUNet


def small(side=2, channels=2, directions=256):
    torch.manual_seed(0)
    return SketchUNet(side, channels, (8,), 4, 6, hidden=8, directions=directions).eval()


@pytest.mark.parametrize("time", [0, 300, 990])
def test_the_closed_form_is_the_posterior_mean_of_v_for_gaussian_pictures(time):
    net, rng = small(), np.random.default_rng(0)
    root = rng.normal(size=(8, 8))
    covariance = root @ root.T / 8
    values, vectors = np.linalg.eigh(covariance)
    net.basis.copy_(torch.from_numpy(vectors))
    net.variances.copy_(torch.from_numpy(values))
    mean, x = rng.normal(size=8), rng.normal(size=8)
    a = float(net.products[time])
    gain = np.sqrt(a * (1 - a)) * (np.eye(8) - covariance) @ np.linalg.inv(a * covariance + (1 - a) * np.eye(8))
    expected = -np.sqrt(1 - a) * mean + gain @ (x - np.sqrt(a) * mean)
    found = net.gaussian(
        torch.tensor(x).view(1, 2, 2, 2).float(), torch.tensor(time), torch.tensor(mean).view(1, 2, 2, 2).float()
    )
    assert np.allclose(found.flatten().numpy(), expected, atol=1e-4)


def test_times_of_a_batch_are_each_pictures_own():
    net = small()
    x, mean, times = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2), torch.tensor([0, 500, 999])
    together = net.gaussian(x, times, mean)
    for i in range(3):
        assert torch.allclose(together[i], net.gaussian(x[i : i + 1], times[i], mean[i : i + 1])[0], atol=1e-6)


@pytest.mark.parametrize(("side", "channels", "directions"), [(2, 2, 5), (20, 3, 16)])
def test_directions_and_variances_are_those_of_the_residuals(side, channels, directions):
    net, entries = small(side, channels, directions), side * side * channels
    x = torch.randn(60, entries) * torch.logspace(0, -2, entries)
    net.fit_residuals(x.view(60, channels, side, side))
    values = np.linalg.eigvalsh((x.T @ x).double().numpy() / 60)[::-1]
    assert np.allclose(net.variances.numpy(), values[:directions], rtol=0.03)
    assert float(net.rest) == pytest.approx(max(1e-4, values[directions:].mean()), rel=0.05)
    total = float(net.variances.sum() + net.rest * (entries - directions))
    assert total == pytest.approx(values.sum(), rel=0.01)


def test_fewer_pictures_than_directions_leave_the_others_at_the_shared_variance():
    net = small(20, 3, 64)
    net.fit_residuals(torch.randn(10, 3, 20, 20))
    assert torch.equal(net.variances[10:], net.rest.expand(54))


def test_a_trained_generator_draws_what_its_pictures_look_like_and_is_saved_whole(tmp_path):
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (64, 3))
    images = torch.from_numpy(np.broadcast_to(colors[:, :, None, None], (64, 3, 16, 16)).astype(np.uint8))
    size = tiny.TinySize(image=16, embedding=8, width=16, channels=(8,), hidden=64)
    encoder = tiny.build_encoder(size)
    encoder.eval()
    mean, std = (torch.tensor([0.5, 0.5, 0.5]).view(3, 1, 1), torch.tensor([0.3, 0.3, 0.3]).view(3, 1, 1))
    tiny.unit_spread(encoder, images, mean, std)
    pipe = tiny.build_tiny_unclip(size, encoder=encoder)
    tiny.train_denoiser(pipe, images, tiny.Training(steps=5, sketch_steps=300, sketch_batch=64, most_level=1))
    made = UnCLIPGenerator(pipe, steps=5)
    views = made.generate(made.embed(images.float() / 255), 0, list(range(64)), guidance=1.0)
    right = np.corrcoef(views.mean(axis=(1, 2)).ravel(), colors.ravel())[0, 1]
    wrong = np.corrcoef(views.mean(axis=(1, 2)).ravel(), np.roll(colors, 1, axis=0).ravel())[0, 1]
    assert right > 0.25 > abs(wrong)
    tiny.save(pipe, tmp_path / "g")
    again = UnCLIPGenerator.from_pretrained(tmp_path / "g", steps=5)
    assert (again.pipe.unet.basis == pipe.unet.basis).all()
    same = again.generate(made.embed(images[:3].float() / 255), 0, [0, 1, 2], guidance=1.0)
    assert abs(same.astype(int) - views[:3].astype(int)).max() <= 1
