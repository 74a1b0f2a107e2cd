import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from visctrl.banks import FeatureBank
from visctrl.control import SelfAttentionController, Source
from visctrl.errors import AttachedError, MissingFeaturesError, ShapeMismatchError, UnsupportedModelError
from visctrl.layers import select_layers, self_attention_layers, watching
from visctrl.selection import ReferenceTokens, choose_keys, foreground_tokens
from visctrl_tiny import latents, tiny_unconditional, tiny_unet

from tenfold import UserError


def watch_tokens(model, *args, **kwargs):
    with watching(model) as seen:
        model(*args, **kwargs)
    return seen


def ask(unet, z, t, text):
    return unet(z, t, encoder_hidden_states=text.expand(len(z), -1, -1)).sample


def recorded(unet, z, t, text, layers="0:", **settings):
    bank = FeatureBank()
    controller = SelfAttentionController(layers, **settings)
    with controller.attach(unet), controller.recording(bank):
        ask(unet, z, t, text)
    return bank


def injected(unet, z, t, text, sources, layers="0:", settings=None, **how):
    controller = SelfAttentionController(layers, **(settings or {}))
    with controller.attach(unet), controller.injecting(sources, **how):
        return ask(unet, z, t, text)


def weights_of(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def processors_of(model):
    return {name: m.processor for name, m in model.named_modules() if hasattr(m, "processor")}


@torch.no_grad()
def test_off_without_strength_or_layers_or_timesteps_the_output_is_the_networks_own_bit_for_bit(unet, text):
    z = latents(0, 2)
    plain = ask(unet, z, 10, text)
    bank = recorded(unet, latents(1), 10, text)
    controller = SelfAttentionController()
    with controller.attach(unet):
        assert controller.mode == "off"
        assert torch.equal(ask(unet, z, 10, text), plain)
    source = [Source(bank)]
    for layers, settings, how in (
        ("0:", {"strength": 0.0}, {}),
        ("none", {}, {}),
        ("0:", {}, {"timesteps": [999]}),
    ):
        with pytest.warns(UserWarning, match="nothing was injected"):
            assert torch.equal(injected(unet, z, 10, text, source, layers, settings, **how), plain)
    assert not torch.equal(injected(unet, z, 10, text, source), plain)
    assert torch.equal(ask(unet, z, 10, text), plain)


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_an_attached_controller_that_is_off_adds_no_operator(unet, text):
    z, found = latents(0), []
    for controlled in (False, True):
        controller = SelfAttentionController()
        with Counted() as counted:
            if controlled:
                with controller.attach(unet):
                    ask(unet, z, 10, text)
            else:
                ask(unet, z, 10, text)
        found.append(counted.calls)
    assert found[0] == found[1]


@torch.no_grad()
def test_recording_and_injecting_take_the_flops_of_a_plain_pass(unet, text):
    z, bank = latents(0), FeatureBank()
    controller, flops = SelfAttentionController(), []
    with controller.attach(unet):
        for context in (None, controller.recording(bank), controller.injecting([Source(bank)])):
            with FlopCounterMode(display=False) as counter:
                if context is None:
                    ask(unet, z, 10, text)
                else:
                    with context:
                        ask(unet, z, 10, text)
            flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == flops[2] > 0


@torch.no_grad()
def test_processors_and_weights_are_the_same_objects_after_every_way_out(unet, text):
    before, weights = processors_of(unet), weights_of(unet)

    for fault in (None, ValueError, KeyboardInterrupt):
        controller = SelfAttentionController()
        ways = contextlib.suppress(ValueError, KeyboardInterrupt)
        with ways, controller.attach(unet), controller.recording(FeatureBank()):
            ask(unet, latents(0), 10, text)
            if fault is not None:
                raise fault
        after = processors_of(unet)
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
        assert controller.mode == "off"
        assert not unet._forward_pre_hooks
    assert all(torch.equal(x, weights[name]) for name, x in unet.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("kind", [AttnProcessor, AttnProcessor2_0, lambda: SlicedAttnProcessor(1)])
def test_injection_is_attention_over_the_references_keys_and_values_computed_by_hand(unet, text, kind):
    unet = copy.deepcopy(unet)
    unet.set_attn_processor(kind())
    layer = self_attention_layers(unet)[2]
    attn = unet.get_submodule(layer.name)
    controller = SelfAttentionController(f"{layer.index}")
    bank = FeatureBank()
    with controller.attach(unet), controller.recording(bank):
        ask(unet, latents(1), 10, text)
    h = torch.randn(2, 16 if layer.place == "mid" else 64, layer.width, generator=torch.Generator().manual_seed(3))
    with controller.attach(unet), controller.injecting([Source(bank)]):
        controller._time, controller.grid = 10.0, (8, 8)
        got = attn(h)
    r = bank.get(10, layer.index).expand(2, -1, -1)
    q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(h), attn.to_k(r), attn.to_v(r)))
    p = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
    want = attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))
    assert (got - want).abs().max() < 1e-6


@torch.no_grad()
def test_a_picture_injected_into_itself_changes_nothing_bit_for_bit(unet, text):
    z = latents(0)
    bank = recorded(unet, z, 10, text)
    assert torch.equal(injected(unet, z, 10, text, [Source(bank)]), ask(unet, z, 10, text))


@torch.no_grad()
def test_an_unconditional_network_that_norms_inside_its_attention_is_injected_alike():
    model, z = tiny_unconditional(), latents(0)
    bank, controller = FeatureBank(), SelfAttentionController()
    plain = model(z, 10).sample
    with controller.attach(model):
        with controller.recording(bank):
            assert torch.equal(model(z, 10).sample, plain)
        with controller.injecting([Source(bank)]):
            assert (model(z, 10).sample - plain).abs().max() < 1e-6
            other = model(latents(1), 10).sample
        assert (other - model(latents(1), 10).sample).abs().max() > 1e-4


@torch.no_grad()
def test_branches_of_guidance_read_their_own_branch_and_swapping_changes_the_result(unet, text):
    null = torch.zeros_like(text)
    z = latents(1).repeat(2, 1, 1, 1)
    bank, controller = FeatureBank(), SelfAttentionController()
    with controller.attach(unet), controller.recording(bank):
        unet(z, 10, encoder_hidden_states=torch.cat([null, text]))
    targets = latents(2, 3)
    both = lambda first, second: torch.cat([first.expand(3, -1, -1), second.expand(3, -1, -1)])  # noqa: E731
    with controller.attach(unet), controller.injecting([Source(bank)], groups=2):
        together = unet(targets.repeat(2, 1, 1, 1), 10, encoder_hidden_states=both(null, text)).sample
        swapped = unet(targets.repeat(2, 1, 1, 1), 10, encoder_hidden_states=both(text, null)).sample
    only = recorded(unet, latents(1), 10, text)
    alone = torch.cat([injected(unet, targets[i : i + 1], 10, text, [Source(only)]) for i in range(3)])
    assert (together[3:] - alone).abs().max() < 1e-5
    assert (together - swapped[[3, 4, 5, 0, 1, 2]]).abs().max() > 1e-4


@torch.no_grad()
def test_references_that_ride_in_the_batch_give_the_banks_result(unet, text):
    reference, target = latents(1), latents(2, 2)
    bank = recorded(unet, reference, 10, text)
    want = injected(unet, target, 10, text, [Source(bank)])
    got = injected(unet, torch.cat([reference, target]), 10, text, [Source(None)], riding=1)
    assert (got[1:] - want).abs().max() < 1e-5
    assert (got[:1] - ask(unet, reference, 10, text)).abs().max() < 1e-6


@torch.no_grad()
def test_the_bias_leads_from_plain_to_replaced_and_without_one_both_are_joined(unet, text):
    z, bank = latents(2), recorded(unet, latents(1), 10, text)
    plain = ask(unet, z, 10, text)
    replaced = injected(unet, z, 10, text, [Source(bank)])
    at = lambda b: injected(unet, z, 10, text, [Source(bank)], settings={"mode": "union", "bias": b})  # noqa: E731
    assert (at(-1e4) - plain).abs().max() < 1e-5
    assert (at(40.0) - replaced).abs().max() < 1e-5
    assert (at(0.0) - at(1e-6)).abs().max() < 1e-4
    own = recorded(unet, z, 10, text)
    twice = injected(unet, z, 10, text, [Source(own)], settings={"mode": "union"})
    assert (twice - plain).abs().max() < 1e-5


@torch.no_grad()
def test_strength_is_affine_in_one_layer(unet, text):
    _z, bank = latents(2), recorded(unet, latents(1), 10, text)
    layer = self_attention_layers(unet)[-1]
    attn, outs = unet.get_submodule(layer.name), []
    h = torch.randn(1, 64, layer.width, generator=torch.Generator().manual_seed(3))
    for strength in (0.0, 0.3, 1.0):
        controller = SelfAttentionController(strength=strength)
        with controller.attach(unet), controller.injecting([Source(bank)]):
            controller._time, controller._asked = 10.0, False
            outs.append(attn(h))
    assert (outs[1] - (0.7 * outs[0] + 0.3 * outs[2])).abs().max() < 1e-6


@torch.no_grad()
def test_the_order_of_the_references_tokens_does_not_matter(unet, text):
    z, bank = latents(2), recorded(unet, latents(1), 10, text)
    shuffled = FeatureBank()
    for layer in bank.layers:
        h = bank.get(10, layer)
        shuffled.put(10, layer, h[:, torch.randperm(h.shape[1], generator=torch.Generator().manual_seed(0))])
    a, b = (injected(unet, z, 10, text, [Source(x)]) for x in (bank, shuffled))
    assert (a - b).abs().max() < 1e-5


def test_keys_chosen_by_masks_are_attention_with_the_others_hidden():
    g = torch.Generator().manual_seed(0)
    own, other, q = torch.randn(3, 2, 16, 8, generator=g)
    own_mask, mask = torch.rand(2, 8, 8, generator=g) > 0.4, torch.rand(8, 8, generator=g) > 0.4
    keys = choose_keys(
        own, [ReferenceTokens(other, (4, 4), mask.float())], "subject", bias=0.7, own_mask=own_mask.float(), grid=(4, 4)
    )
    bias = 0.0 if keys.bias is None else keys.bias
    got = F.scaled_dot_product_attention(q, keys.tokens, keys.tokens, attn_mask=bias)
    behind = ~foreground_tokens(own_mask.float(), (4, 4), 16)
    ahead = foreground_tokens(mask.float(), (4, 4), 16)
    hide = torch.cat([torch.where(behind, 0.0, -torch.inf), torch.where(ahead, 0.7, -torch.inf).expand(2, -1)], dim=1)
    both = torch.cat([own, other], dim=1)
    want = F.scaled_dot_product_attention(q, both, both, attn_mask=hide[:, None])
    assert keys.tokens.shape[1] < 32
    assert (got - want).abs().max() < 1e-6
    assert [x.shape[1] for x in (keys.tokens, keys.positions)] == [keys.tokens.shape[1]] * 2


def test_a_query_never_loses_all_its_keys():
    own, other = torch.randn(2, 1, 16, 8)
    nothing = torch.zeros(8, 8)
    assert (
        choose_keys(own, [ReferenceTokens(other, (4, 4), nothing)], "subject", own_mask=1 - nothing[None], grid=(4, 4))
        is None
    )
    assert (
        choose_keys(own, [ReferenceTokens(other, (4, 4), nothing)], "subject", own_mask=nothing[None], grid=(4, 4))
        is None
    )


@torch.no_grad()
def test_attention_over_a_reference_allocates_nothing_of_the_size_of_all_pairs():
    from tenfold.memory import MemoryProbe

    peaks = {}
    for number in (1024, 4096):
        attn = tiny_unet().get_submodule(self_attention_layers(tiny_unet())[0].name)
        q, own = torch.randn(2, 1, number, attn.to_q.in_features)
        side = int(number**0.5)
        with MemoryProbe() as probe:
            mask = (torch.arange(number).view(side, side) % 3 > 0).float()
            keys = choose_keys(
                own, [ReferenceTokens(own, (side, side), mask)], "subject", own_mask=mask[None], grid=(side, side)
            )
            attn.processor(attn, q, keys.tokens, keys.bias)
        peaks[number] = probe.peak_bytes
    assert peaks[4096] / peaks[1024] <= 4.5


def test_layers_are_numbered_as_they_run(unet, text):
    seen = watch_tokens(unet, latents(0), 10, encoder_hidden_states=text)
    assert [layer.index for layer in seen] == list(range(len(seen)))
    assert [layer.place for layer in seen] == ["down", "mid", "up", "up"]
    assert [layer.tokens for layer in seen] == [64, 16, 64, 64]
    seen = watch_tokens(tiny_unconditional(), latents(0), 10)
    assert [layer.index for layer in seen] == list(range(4))


SD15 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 64,
}
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def test_the_layers_of_stable_diffusion_are_those_that_its_users_know():
    with torch.device("meta"):
        sd, xl = UNet2DConditionModel(**SD15), UNet2DConditionModel(**SDXL)
        z, words = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768)
        small = watch_tokens(sd, z, torch.tensor(1.0), encoder_hidden_states=words)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        big = watch_tokens(
            xl, torch.empty(1, 4, 128, 128), torch.tensor(1.0), torch.empty(1, 77, 2048), added_cond_kwargs=added
        )
    assert [x.index for x in small] == list(range(16))
    assert [(x.tokens, x.width) for x in small] == [
        *[(4096, 320)] * 2, *[(1024, 640)] * 2, *[(256, 1280)] * 2, (64, 1280), *[(256, 1280)] * 3, *[(1024, 640)] * 3,
        *[(4096, 320)] * 3,
    ]  # fmt: skip
    assert {x.heads for x in small} == {8}
    assert [x.index for x in big] == list(range(70))
    assert [x.tokens for x in big] == [4096] * 4 + [1024] * 60 + [4096] * 6


def test_layers_are_chosen_by_number_place_and_name_and_a_typo_is_answered_with_what_there_is(unet):
    layers = self_attention_layers(unet)
    assert select_layers("1:", layers) == (1, 2, 3)
    assert select_layers("-1,0", layers) == (0, 3)
    assert select_layers("mid,up", layers) == (1, 2, 3)
    assert select_layers(layers[2].name, layers) == (2,)
    assert select_layers("none", layers) == ()
    for wrong, said in (("7", "0 to 3"), ("upp", "did you mean up"), ("1:2:3", "0 to 3")):
        with pytest.raises(ValueError, match=said):
            select_layers(wrong, layers)


@torch.no_grad()
def test_what_cannot_be_controlled_is_refused_and_the_network_left_as_it_was(unet, text):
    bank = recorded(unet, latents(1), 10, text)
    controller = SelfAttentionController()
    with controller.attach(unet):
        with pytest.raises(AttachedError, match="attached already"):
            controller.attach(unet).__enter__()
        with pytest.raises(AttachedError, match="another controller"):
            SelfAttentionController().attach(unet).__enter__()
        with controller.injecting([Source(bank)]):
            with pytest.raises(MissingFeaturesError, match="timestep 20: recorded are timesteps 10"):
                ask(unet, latents(0), 20, text)
            with pytest.raises(ValueError, match="several timesteps"):
                ask(unet, latents(0, 2), torch.tensor([10, 20]), text)
        with pytest.raises(ValueError, match="at least one reference"):
            controller.injecting([]).__enter__()
    with pytest.raises(AttachedError, match="attach the controller"):
        controller.recording(bank).__enter__()
    fused = copy.deepcopy(unet)
    fused.fuse_qkv_projections()
    with pytest.raises(UnsupportedModelError, match="unfuse_qkv_projections"):
        SelfAttentionController().attach(fused).__enter__()
    with pytest.raises(UnsupportedModelError, match="no self-attention"):
        SelfAttentionController().attach(torch.nn.Linear(2, 2)).__enter__()
    odd = copy.deepcopy(unet)

    class Mine(AttnProcessor2_0):
        pass

    odd.set_attn_processor(Mine())
    with pytest.raises(UnsupportedModelError, match="processor Mine"):
        SelfAttentionController().attach(odd).__enter__()
    with SelfAttentionController(trust=[Mine]).attach(odd):
        pass
    for wrong in ({"strength": 1.5}, {"mode": "swap"}):
        with pytest.raises(ValueError, match=r"strength|mode"):
            SelfAttentionController(**wrong)
    small = FeatureBank()
    small.put(10, 0, torch.zeros(1, 4, 3))
    with pytest.raises(ShapeMismatchError, match="3 entries"):
        injected(unet, latents(0), 10, text, [Source(small)])
    assert isinstance(processors_of(unet)[next(iter(processors_of(unet)))], AttnProcessor2_0)


def test_a_bank_counts_its_bytes_keeps_its_limit_and_is_half_of_keys_and_values(unet, text, tmp_path):
    bank = recorded(unet, latents(1), 10, text)
    layers = self_attention_layers(unet)
    with torch.no_grad():
        pairs = sum(
            part(bank.get(10, x.index)).nbytes
            for x in layers
            for part in (unet.get_submodule(x.name).to_k, unet.get_submodule(x.name).to_v)
        )
    assert bank.nbytes * 2 == pairs
    bank.put(10, 0, bank.get(10, 0))
    assert bank.nbytes * 2 == pairs
    with pytest.raises(MemoryError, match="more than 100 bytes"):
        FeatureBank(max_bytes=100).put(10, 0, bank.get(10, 0))
    bank.about = {"model": "a", "steps": 3}
    bank.save(tmp_path / "b.safetensors")
    loaded = FeatureBank.load(tmp_path / "b.safetensors")
    assert (loaded.nbytes, loaded.times, loaded.layers, loaded.about) == (
        bank.nbytes,
        bank.times,
        bank.layers,
        bank.about,
    )
    assert all(torch.equal(loaded.get(10, i), bank.get(10, i)) for i in bank.layers)
    with pytest.raises(UserError, match="another model: a, expected b"):
        loaded.check({"model": "b"})


def sd3():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    ).eval()  # fmt: skip


def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    ).eval()  # fmt: skip


def of_sd3(model, z, t=10.0):
    g = torch.Generator().manual_seed(5)
    words, pooled = torch.randn(1, 3, 16, generator=g), torch.randn(1, 8, generator=g)
    return model(
        z, words.expand(len(z), -1, -1), pooled.expand(len(z), -1), torch.full((len(z),), t), return_dict=False
    )[0]


def of_flux(model, z, t=0.5):
    g = torch.Generator().manual_seed(5)
    words, pooled = torch.randn(1, 3, 16, generator=g), torch.randn(1, 8, generator=g)
    place = torch.zeros(16, 3)
    place[:, 1], place[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return model(
        z.flatten(2).transpose(1, 2)[:, :16], words.expand(len(z), -1, -1), pooled.expand(len(z), -1),
        torch.full((len(z),), t), place, torch.zeros(3, 3), return_dict=False,
    )[0]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("build", "call", "number"), [(sd3, of_sd3, 3), (flux, of_flux, 2)], ids=["sd3", "flux"])
def test_transformers_of_picture_and_text_inject_the_pictures_keys_and_keep_the_texts(build, call, number):
    model = build()
    layers = self_attention_layers(model)
    assert [x.index for x in layers] == list(range(number))
    bank, controller = FeatureBank(), SelfAttentionController()
    z, other = latents(0), latents(1)
    plain, before = call(model, z), processors_of(model)
    with controller.attach(model, grid=(4, 4)):
        with controller.recording(bank):
            assert torch.equal(call(model, z), plain)
        with controller.injecting([Source(bank)]):
            assert (call(model, z) - plain).abs().max() < 1e-5, "its own keys"
            replaced = call(model, other)
    free = call(model, other)
    assert (replaced - free).abs().max() > 1e-4
    c = SelfAttentionController(mode="union", bias=-1e4)
    with c.attach(model, grid=(4, 4)), c.injecting([Source(bank)]):
        assert (call(model, other) - free).abs().max() < 1e-4
    c = SelfAttentionController(strength=0.5)
    with c.attach(model, grid=(4, 4)), c.injecting([Source(bank)]):
        assert (call(model, other) - free).abs().max() > 1e-5
    assert all(processors_of(model)[name] is before[name] for name in before)


def test_gradients_reach_the_targets_latents(unet, text):
    bank = recorded(unet, latents(1), 10, text)
    z = latents(2).requires_grad_()
    injected(unet, z, 10, text, [Source(bank)]).square().sum().backward()
    assert z.grad.abs().sum() > 0


def test_a_lora_keeps_its_effect_under_control(text):
    from peft import LoraConfig

    unet = tiny_unet()
    with torch.no_grad():
        bank = recorded(unet, latents(1), 10, text)
        plain = injected(unet, latents(2), 10, text, [Source(bank)])
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    with torch.no_grad():
        own = recorded(unet, latents(1), 10, text)
        changed = injected(unet, latents(2), 10, text, [Source(own)])
        unet.disable_adapters()
        again = injected(unet, latents(2), 10, text, [Source(bank)])
    assert (changed - plain).abs().max() > 1e-3
    assert (again - plain).abs().max() < 1e-6
