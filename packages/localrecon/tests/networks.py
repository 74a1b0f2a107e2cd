"""Sixty networks that people train, small: each is cut, compared with itself, and trained one step by every method.

``python packages/localrecon/tests/networks.py`` prints the table of docs/localrecon.md.
"""

import copy
import dataclasses
import sys
import warnings

import torch
from localrecon import LocalNet, SGRConfig, StepOptions, local_step, plan_split, untie
from localrecon.arms import run_as
from localrecon.chain import SharedParameterError, UnsplittableModelError
from localrecon.inputs import call, logits_of

METHODS = {"bp": 1, "ckpt": 1, "accum": 1, "local": 0, "sgr": 0}


def tv(name, size=64, batch=4, **options):
    def make():
        from torchvision import models

        return models.get_model(name, num_classes=5, **options), torch.randn(batch, 3, size, size)

    return make


def tv_vit():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 3, 2, 32, 64, dropout=0.1, num_classes=5)
    torch.nn.init.normal_(model.heads.head.weight, std=0.1)
    return model, torch.randn(4, 3, 32, 32)


def tv_bottlenecks():
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 2, 1, 1], 5, width_per_group=16), torch.randn(4, 3, 64, 64)


def tv_convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    stages = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 2)]
    return ConvNeXt(stages, 0.2, num_classes=5), torch.randn(4, 3, 64, 64)


def tv_swin():
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 16, [1, 2], [2, 4], [4, 4], num_classes=5), torch.randn(4, 3, 32, 32)


def timm(name, size=64, batch=4, **options):
    def make():
        from timm import create_model

        return create_model(name, num_classes=5, **options), torch.randn(batch, 3, size, size)

    return make


VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}
DECODER = TEXT | {"num_key_value_heads": 1, "pad_token_id": 0, "tie_word_embeddings": False}


def hf(config, model, tokens=True, **options):
    def make():
        import transformers

        made = getattr(transformers, model)(getattr(transformers, config)(**options))
        x = torch.randint(3, 40, (4, 8))
        return untie(made), {"input_ids": x, "attention_mask": torch.ones(4, 8).long().tril(6)} if tokens else x

    return make


def whisper():
    from transformers import WhisperConfig, WhisperForAudioClassification

    config = WhisperConfig(
        d_model=16,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        max_source_positions=16,
        num_mel_bins=8,
        num_labels=5,
        classifier_proj_size=8,
    )
    return WhisperForAudioClassification(config), {"input_features": torch.randn(4, 8, 32)}


def t5():
    from transformers import T5Config, T5ForTokenClassification

    small = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2, "num_labels": 5}
    return T5ForTokenClassification(T5Config(**small)), {
        "input_ids": torch.randint(3, 40, (4, 8)),
        "attention_mask": torch.ones(4, 8).long().tril(6),
    }


def hf_images(config, model, size=32, **options):
    def make():
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(num_labels=5, **options)), torch.randn(
            4, 3, size, size
        )

    return make


NETWORKS = {
    "torchvision resnet18": tv("resnet18"),
    "torchvision ResNet of bottlenecks": tv_bottlenecks,
    "torchvision densenet121": tv("densenet121", 32),
    "torchvision mobilenet_v2": tv("mobilenet_v2"),
    "torchvision mobilenet_v3_small": tv("mobilenet_v3_small"),
    "torchvision efficientnet_b0": tv("efficientnet_b0"),
    "torchvision regnet_y_400mf": tv("regnet_y_400mf"),
    "torchvision shufflenet_v2_x0_5": tv("shufflenet_v2_x0_5"),
    "torchvision squeezenet1_1": tv("squeezenet1_1"),
    "torchvision mnasnet0_5": tv("mnasnet0_5"),
    "torchvision googlenet": tv("googlenet", 64, aux_logits=False, init_weights=False),
    "torchvision inception_v3": tv("inception_v3", 128, aux_logits=False, init_weights=False),
    "torchvision ConvNeXt, stochastic depth": tv_convnext,
    "torchvision SwinTransformer": tv_swin,
    "torchvision VisionTransformer": tv_vit,
    "timm resnet18": timm("resnet18", drop_path_rate=0.1),
    "timm resnet10t": timm("resnet10t"),
    "timm seresnet18": timm("legacy_seresnet18"),
    "timm convnext_atto": timm("convnext_atto", drop_path_rate=0.1),
    "timm convnextv2_atto": timm("convnextv2_atto"),
    "timm efficientnet_b0": timm("efficientnet_b0", drop_path_rate=0.1, drop_rate=0.1),
    "timm tf_efficientnet_lite0": timm("tf_efficientnet_lite0"),
    "timm mobilenetv3_small_050": timm("mobilenetv3_small_050"),
    "timm mobilenetv4_conv_small": timm("mobilenetv4_conv_small_050"),
    "timm regnetx_002": timm("regnetx_002"),
    "timm nf_regnet_b0": timm("nf_regnet_b0"),
    "timm repvgg_a0": timm("repvgg_a0", 32),
    "timm ghostnet_050": timm("ghostnet_050"),
    "timm hrnet_w18_small": timm("hrnet_w18_small"),
    "timm ese_vovnet19b_slim_dw": timm("ese_vovnet19b_slim_dw"),
    "timm edgenext_xx_small": timm("edgenext_xx_small"),
    "timm mobilevit_xxs": timm("mobilevit_xxs"),
    "timm fastvit_t8": timm("fastvit_t8"),
    "timm poolformer_s12": timm("poolformer_s12"),
    "timm vit_tiny": timm("vit_tiny_patch16_224", 32, drop_path_rate=0.1, **VIT),
    "timm deit_tiny_distilled": timm("deit_tiny_distilled_patch16_224", 32, **VIT),
    "timm cait_xxs24": timm("cait_xxs24_224", 32, img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2),
    "timm eva02_tiny": timm("eva02_tiny_patch14_224", 28, img_size=28, depth=3, embed_dim=32, num_heads=2),
    "timm swin_tiny": timm(
        "swin_tiny_patch4_window7_224", 56, img_size=56, embed_dim=24, depths=(1, 2), num_heads=(2, 4)
    ),
    "timm xcit_nano": timm("xcit_nano_12_p16_224", 64, img_size=64, depth=3, embed_dim=32, num_heads=2),
    "timm mixer_s32": timm("mixer_s32_224", 64, img_size=64),
    "timm resmlp_12": timm("resmlp_12_224", 64, img_size=64),
    "timm pvt_v2_b0": timm("pvt_v2_b0"),
    "timm rexnet_100": timm("rexnet_100"),
    "timm starnet_s1": timm("starnet_s1"),
    "timm crossvit_tiny_240": timm("crossvit_tiny_240", 240, 2),
    "transformers GPT-2": hf(
        "GPT2Config", "GPT2LMHeadModel", vocab_size=40, n_positions=16, n_embd=16, n_layer=3, n_head=2
    ),
    "transformers Llama": hf("LlamaConfig", "LlamaForCausalLM", **DECODER),
    "transformers Qwen2, full and sliding attention": hf(
        "Qwen2Config", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=3, max_window_layers=2, **DECODER
    ),
    "transformers Gemma 2": hf("Gemma2Config", "Gemma2ForCausalLM", head_dim=8, sliding_window=3, **DECODER),
    "transformers Mixtral": hf("MixtralConfig", "MixtralForCausalLM", num_local_experts=2, **DECODER),
    "transformers BERT": hf("BertConfig", "BertForSequenceClassification", num_labels=5, **TEXT),
    "transformers RoBERTa": hf("RobertaConfig", "RobertaForSequenceClassification", num_labels=5, **TEXT),
    "transformers DistilBERT": hf(
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        vocab_size=40,
        dim=16,
        n_layers=3,
        n_heads=2,
        hidden_dim=24,
        num_labels=5,
    ),
    "transformers ALBERT (one layer, used again and again)": hf(
        "AlbertConfig", "AlbertForSequenceClassification", embedding_size=8, num_labels=5, **TEXT
    ),
    "transformers T5 (encoder)": t5,
    "transformers Whisper (encoder)": whisper,
    "transformers ViT": hf_images(
        "ViTConfig",
        "ViTForImageClassification",
        image_size=32,
        patch_size=8,
        **{k: v for k, v in TEXT.items() if k != "vocab_size"},
    ),
    "transformers ConvNeXt": hf_images(
        "ConvNextConfig", "ConvNextForImageClassification", hidden_sizes=[8, 16], depths=[2, 2], num_stages=2
    ),
    "transformers Swin": hf_images(
        "SwinConfig",
        "SwinForImageClassification",
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[1, 2],
        window_size=4,
    ),
}


def varied(model):
    """The model without weights that are zero at the start, behind which nothing would learn in one step."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and float(parameter.abs().max()) < 1e-3:
                parameter.normal_(std=0.05)
    return model


def outcome(name):
    """What a network gives: (blocks, "all methods"), or (0, the line that refuses it)."""
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    varied(model).train()
    reference = copy.deepcopy(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*trained parameters, which stay")
            plan = plan_split(model, x, k=1, measure=False)
    except (UnsplittableModelError, SharedParameterError) as refusal:
        return 0, str(refusal)
    if len(plan.blocks) < 2:
        return len(
            plan.blocks
        ), "one block: two tensors cross everywhere else, so it is trained by bp, ckpt and accum alone"
    whole = LocalNet(model, plan).eval()
    with torch.no_grad():
        wanted = logits_of(call(reference.eval(), x))
        assert torch.equal(logits_of(whole(x)), wanted)
        torch.testing.assert_close(whole.forward_exits(x)[-1], wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
    blocks = len(plan.blocks)
    k = min(3, blocks)
    edges = tuple(round(i * blocks / k) for i in range(1, k))
    labels = torch.randint(5, (4, 8) if plan.task == "lm" else (wanted.shape[0],))
    for method, modules in METHODS.items():
        cuts = () if modules == 1 else edges
        net = run_as(method, copy.deepcopy(model), dataclasses.replace(plan, cuts=cuts)).train()
        before = {key: p.detach().clone() for key, p in net.model.named_parameters()}
        sgr = SGRConfig(ramp=0) if method == "sgr" else SGRConfig(lam=0)
        optimizers = [torch.optim.SGD(net.parameters_of(i), lr=0.01) for i in range(net.k)]
        report = local_step(net, x, labels, optimizers, sgr, StepOptions(accumulate=2 if method == "accum" else 1))
        assert all(torch.isfinite(torch.tensor(report.losses))), (method, report.losses)
        still = [key for key, p in net.model.named_parameters() if torch.equal(before[key], p)]
        assert len(still) <= len(before) / 2, (method, still[:5])
    return blocks, "all methods"


def main() -> int:
    """Print the table."""
    trained = 0
    names = [name for name in NETWORKS if not sys.argv[1:] or any(word in name for word in sys.argv[1:])]
    rows = []
    for name in names:
        try:
            blocks, found = outcome(name)
        except Exception as error:
            blocks, found = -1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        trained += blocks > 1
        rows.append(f"| {name} | {blocks or '-'} | {found} |")
        sys.stdout.write(rows[-1] + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"{trained} of {len(names)} train with all methods\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
