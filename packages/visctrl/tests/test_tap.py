import pytest
import torch
from test_control import flux, of_flux, of_sd3, sd3
from visctrl.banks import FeatureBank
from visctrl.control import SelfAttentionController, Source
from visctrl.errors import ShapeMismatchError, UnsupportedModelError
from visctrl.tap import KeyTap
from visctrl_tiny import latents, tiny_unet


@torch.no_grad()
@pytest.mark.parametrize(("build", "call"), [(sd3, of_sd3), (flux, of_flux)], ids=["sd3", "flux"])
def test_the_tap_gives_what_the_processors_that_know_the_model_give(build, call):
    model, z, other = build(), latents(0), latents(1, 2)
    bank, controller = FeatureBank(), SelfAttentionController()
    with controller.attach(model, grid=(4, 4)):
        with controller.recording(bank):
            plain = call(model, z)
        with controller.injecting([Source(bank)]):
            want = call(model, other)
    own, tap = FeatureBank(), KeyTap(tokens=slice(-16, None))
    with tap.attach(model):
        with tap.recording(own):
            assert torch.equal(call(model, z), plain)
        with tap.injecting(own):
            assert (call(model, other) - want).abs().max() < 1e-5
    assert tap.injected > 0
    assert (call(model, other) - want).abs().max() > 1e-4
    assert not any(m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_cross_attention_is_left_alone_and_another_number_of_tokens_is_refused():
    unet, text, tap, bank = tiny_unet(), torch.randn(1, 5, 16), KeyTap(), FeatureBank()
    plain, controlled = FeatureBank(), SelfAttentionController()
    with tap.attach(unet), tap.recording(bank):
        unet(latents(0), 10, text)
    with controlled.attach(unet), controlled.recording(plain):
        unet(latents(0), 10, text)
    assert len(bank.layers) == len(plain.layers) < len(tap.names)
    with tap.attach(unet), tap.injecting(bank), pytest.raises(ShapeMismatchError, match="features"):
        unet(latents(1, size=12), 10, text)
    with (
        pytest.warns(UserWarning, match="nothing was injected"),
        tap.attach(unet),
        tap.injecting(bank, timesteps=[500]),
    ):
        unet(latents(1), 10, text)
    with pytest.raises(UnsupportedModelError, match="to_q"):
        KeyTap().attach(torch.nn.Linear(1, 1)).__enter__()
