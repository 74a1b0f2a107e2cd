import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from visctrl.inversion import Trajectory, denoise, invert
from visctrl.steppers import DDIMStepper, stepper_of
from visctrl_tiny import SCHEDULE, ddim

from tenfold import UserError

KINDS = [
    pytest.param({"steps_offset": 0}, 10, id="leading from 0"),
    pytest.param({"steps_offset": 1}, 10, id="leading from 1"),
    pytest.param({"timestep_spacing": "trailing"}, 30, id="trailing, not dividing"),
    pytest.param({"timestep_spacing": "linspace"}, 7, id="linspace"),
    pytest.param({"prediction_type": "v_prediction"}, 10, id="velocity"),
    pytest.param({"prediction_type": "sample"}, 10, id="clean picture"),
]


@pytest.mark.parametrize(("changes", "steps"), KINDS)
def test_a_move_there_and_back_with_the_same_answer_is_the_identity(changes, steps):
    stepper = stepper_of(ddim(**changes), steps)
    z, output, asked = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for i in range(1, len(stepper) + 1):
        there = stepper.move(z, output, asked, i, i - 1, i)
        back = stepper.move(there, output, asked, i, i, i - 1)
        assert (back - z).abs().max() <= 1e-5 * max(1.0, float(output.abs().max()))


def test_a_move_of_flow_matching_there_and_back_is_the_identity():
    stepper = stepper_of(FlowMatchEulerDiscreteScheduler(shift=3.0), 7)
    assert stepper.levels[0] == 0
    assert stepper.levels[-1] == 1
    z, u = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    there = stepper.move(z, u, z, 3, 2, 3)
    assert (stepper.move(there, u, z, 3, 3, 2) - z).abs().max() < 1e-6


@pytest.mark.parametrize("changes", [{}, {"timestep_spacing": "trailing"}, {"prediction_type": "v_prediction"}])
def test_denoising_steps_are_those_of_ddim_of_diffusers_where_the_steps_divide(changes):
    scheduler, stepper = ddim(**changes), stepper_of(ddim(**changes), 10)
    scheduler.set_timesteps(10)
    assert [int(t) for t in scheduler.timesteps] == [int(t) for t in stepper.timesteps[::-1]]
    g = torch.Generator().manual_seed(1)
    z = torch.randn(1, 4, 8, 8, generator=g)
    for k, t in enumerate(scheduler.timesteps):
        output, i = torch.randn(z.shape, generator=g), 10 - k
        theirs = scheduler.step(output, t, z, eta=0.0).prev_sample
        z = stepper.move(z, output, z, i, i, i - 1)
        assert (z - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_inverting_steps_are_those_of_diffusers_inverse_scheduler_for_noise():
    theirs = DDIMInverseScheduler(**SCHEDULE, steps_offset=1, set_alpha_to_one=False, timestep_spacing="leading")
    theirs.set_timesteps(10)
    stepper = stepper_of(ddim(), 10)
    g = torch.Generator().manual_seed(1)
    z = torch.randn(1, 4, 8, 8, generator=g)
    output = torch.randn(z.shape, generator=g)
    for i in range(2, 10):
        moved = theirs.step(output, int(stepper.timesteps[i - 1]), z).prev_sample
        assert (stepper.move(z, output, z, i, i - 1, i) - moved).abs().max() < 1e-4


def test_a_step_from_the_clean_end_to_itself_is_left_out_and_changes_nothing():
    kept = stepper_of(ddim(steps_offset=0), 10)
    assert len(kept) == 9
    assert kept.steps == 10
    whole = DDIMStepper([kept.levels[0], *kept.levels], [0.0, *kept.timesteps])
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    calls = []

    def predict(z, i, last, timesteps):
        calls.append(i)
        return torch.sin(3 * z) + timesteps[i - 1] / 1000

    short = denoise(lambda z, i, last: predict(z, i, last, kept.timesteps), z, kept)
    assert len(calls) == 9
    long = denoise(lambda z, i, last: predict(z, i, last, whole.timesteps), z, whole)
    assert (short - long).abs().max() < 1e-6


def test_a_level_without_signal_is_left_out():
    scheduler = ddim(timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction")
    stepper = stepper_of(scheduler, 10)
    assert len(stepper) == 9
    assert stepper.levels[-1] > 0
    assert stepper.injected(0.4) == 6  # steps 4 to 9 are injected, as of the whole schedule
    with pytest.raises(ValueError, match="level of 0"):
        DDIMStepper([1.0, 0.0], [999.0])


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_give_their_levels_and_none_is_changed(kind):
    scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    scheduler.set_timesteps(4)
    before = scheduler.timesteps.clone()
    stepper = stepper_of(scheduler, 10)
    assert len(stepper) == 10
    assert np.all(np.diff(stepper.levels) < 0)
    assert torch.equal(scheduler.timesteps, before)


def test_a_shifted_flow_schedule_is_that_of_the_scheduler_and_needs_the_size():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    with pytest.raises(UserError, match="number of image tokens"):
        stepper_of(scheduler, 4)
    stepper = stepper_of(scheduler, 4, tokens=256)
    mu = 0.5
    shifted = [math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in (0.25, 0.5, 0.75, 1.0)]
    assert np.allclose(stepper.levels, [0, *shifted], atol=1e-6)


def test_impossible_schedules_are_refused():
    with pytest.raises(UserError, match="1 to 1000"):
        stepper_of(ddim(), 1001)
    with pytest.raises(UserError, match="beyond"):
        stepper_of(ddim(steps_offset=999), 10)
    with pytest.raises(UserError, match="no step"):
        stepper_of(ddim(steps_offset=0), 1)


class Gaussian:
    """The exact denoiser of data N(mu, s^2): noise is an affine function of the latents."""

    def __init__(self, stepper, mu=0.3, s=0.5):
        self.stepper, self.mu, self.s = stepper, mu, s

    def slope(self, i):
        a = self.stepper.levels[i]
        return math.sqrt(1 - a) / (a * self.s**2 + 1 - a)

    def __call__(self, z, i, last):
        return self.slope(i) * (z - math.sqrt(self.stepper.levels[i]) * self.mu)

    def exact(self, z, i):
        """The latents at level i from which one step gives z, solved."""
        a, b, c = self.stepper.levels[i], self.stepper.levels[i - 1], self.slope(i)
        q = math.sqrt(1 - b) - math.sqrt(b * (1 - a) / a)
        return (z + q * c * math.sqrt(a) * self.mu) / (math.sqrt(b / a) + q * c)


@pytest.fixture
def gaussian():
    return Gaussian(stepper_of(ddim(), 10))


def test_refinement_converges_to_the_exact_inverse(gaussian):
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = invert(gaussian, z, gaussian.stepper, refine=60)
    assert not found.fallen_back.any()
    exact = [z]
    for i in range(1, 11):
        exact.append(gaussian.exact(exact[-1], i))
    assert (found.latents[-1] - exact[-1]).abs().max() < 1e-10
    assert (denoise(gaussian, found.latents[-1], gaussian.stepper) - z).abs().max() < 1e-10


def test_refinement_contracts_at_the_predicted_rate(gaussian):
    z = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = invert(gaussian, z, gaussian.stepper, refine=5, until=1)
    b, a = gaussian.stepper.levels[:2]
    rate = abs(math.sqrt(1 - a) - math.sqrt(a * (1 - b) / b)) * gaussian.slope(1)
    ratios = found.residuals[0, 1:4, 0]
    measured = (ratios[1:] / ratios[:-1]).tolist()
    assert measured == pytest.approx([rate, rate], rel=0.02)


def test_one_evaluation_is_plain_inversion_bit_for_bit(gaussian):
    z = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    found = invert(gaussian, z, gaussian.stepper, refine=1)
    for i in range(1, 11):
        z = gaussian.stepper.move(z, gaussian(z, i, True), z, i, i - 1, i)
    assert torch.equal(found.latents[-1], z)


def test_a_refinement_that_does_not_contract_falls_back_to_the_plain_step_for_that_picture_alone(gaussian):
    def wild(z, i, last):
        out = gaussian(z, i, last)
        out[1] = 40 * torch.sin(90 * z[1])
        return out

    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, alone = (invert(p, x, gaussian.stepper, refine=4) for p, x in ((wild, z), (gaussian, z[:1])))
    assert found.fallen_back[:, 1].any()
    assert not found.fallen_back[:, 0].any()
    assert torch.equal(found.latents[-1][:1], alone.latents[-1])
    level = int(found.fallen_back[:, 1].nonzero()[0]) + 1
    plain = gaussian.stepper.move(
        found.latents[level - 1], wild(found.latents[level - 1], level, True), z, level, level - 1, level
    )
    assert torch.equal(found.latents[level][1], plain[1])


def test_an_answer_that_is_not_finite_ends_the_inversion_with_its_level(gaussian):
    from visctrl.errors import DivergedError

    def broken(z, i, last):
        return gaussian(z, i, last) / (0 if i == 3 else 1)

    with pytest.raises(DivergedError, match="level 3 of 10"):
        invert(broken, torch.ones(1, 4, 2, 2), gaussian.stepper)


def test_partial_inversion_gives_the_full_runs_result(gaussian):
    z = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = invert(gaussian, z, gaussian.stepper, refine=60)
    part = invert(gaussian, z, gaussian.stepper, refine=60, until=6)
    down = whole.latents[-1]
    for i in range(10, 6, -1):
        down = gaussian.stepper.move(down, gaussian(down, i, True), down, i, i, i - 1)
    assert (down - part.latents[-1]).abs().max() < 1e-10


def test_a_trajectory_is_saved_and_loaded_bit_for_bit_and_knows_its_schedule(gaussian, tmp_path):
    z = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    found = invert(gaussian, z, gaussian.stepper, refine=2, until=4)
    found.save(tmp_path / "t.safetensors")
    loaded = Trajectory.load(tmp_path / "t.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(found.latents, loaded.latents, strict=True))
    assert torch.equal(found.residuals, loaded.residuals)
    assert (loaded.timesteps, loaded.levels) == (found.timesteps, found.levels)
    loaded.check(gaussian.stepper, (4, 3, 3))
    with pytest.raises(UserError, match="another schedule"):
        loaded.check(stepper_of(ddim(), 5), (4, 3, 3))
    with pytest.raises(UserError, match="latents"):
        loaded.check(gaussian.stepper, (4, 8, 8))
    with pytest.raises(UserError, match=r"no such file|safetensors"):
        Trajectory.load(tmp_path / "none.safetensors")
