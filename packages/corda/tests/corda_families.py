"""One tiny random model of each family that people adapt, its samples, and the sums over each sample alone."""

import torch
import transformers as tf
from peft import LoraConfig
from torch import nn

SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def ids(length, seed, low=3, high=50):
    return torch.randint(low, high, (length,), generator=torch.Generator().manual_seed(seed))


def decoder_only(model):
    return model, [{"input_ids": ids(length, length)} for length in (9, 5, 7)]


def llama():
    return decoder_only(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, **TEXTS, num_key_value_heads=1)))


def qwen3():
    return decoder_only(tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZE, **TEXTS, num_key_value_heads=1, head_dim=8)))


def gemma3():
    own = {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return decoder_only(tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SIZE, **TEXTS, **own)))


def gpt2():
    return decoder_only(tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **TEXTS)))


def mamba():
    own = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 3}
    return decoder_only(tf.MambaForCausalLM(tf.MambaConfig(**own, **TEXTS)))


def bert():
    return decoder_only(tf.BertForSequenceClassification(tf.BertConfig(**SIZE, **TEXTS, num_labels=3)))


def roberta():
    config = tf.RobertaConfig(**SIZE, **TEXTS, num_labels=3, max_position_embeddings=40)
    return decoder_only(tf.RobertaForSequenceClassification(config))


def translations():
    return [{"input_ids": ids(a, a), "labels": ids(b, 9 + b)} for a, b in ((6, 8), (8, 3), (4, 5))]


def t5():
    config = tf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, **TEXTS)
    return tf.T5ForConditionalGeneration(config), translations()


def bart():
    sides = ("encoder", "decoder")
    own = {f"{s}_{k}": v for s in sides for k, v in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))}
    config = tf.BartConfig(d_model=16, max_position_embeddings=32, decoder_start_token_id=2, **own, **TEXTS)
    return tf.BartForConditionalGeneration(config), translations()


def whisper():
    """Its encoder sees all frames of the sound, whose length is fixed, but not all of them count."""
    sides = ("encoder", "decoder")
    own = {f"{s}_{k}": v for s in sides for k, v in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))}
    config = tf.WhisperConfig(
        d_model=16,
        num_mel_bins=4,
        max_source_positions=10,
        max_target_positions=20,
        decoder_start_token_id=1,
        **own,
        **TEXTS,
    )
    generator = torch.Generator().manual_seed(0)
    samples = []
    for heard, length in ((20, 6), (11, 4), (14, 7)):
        mask = (torch.arange(20) < heard).long()
        sound = torch.randn(4, 20, generator=generator)
        samples.append({"input_features": sound, "attention_mask": mask, "labels": ids(length, length)})
    return tf.WhisperForConditionalGeneration(config), samples


def pictures(count, size):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def vit():
    config = tf.ViTConfig(**SIZE, image_size=8, patch_size=4, num_labels=3)
    return tf.ViTForImageClassification(config), [{"pixel_values": picture} for picture in pictures(3, 8)]


def clip():
    vision = {**SIZE, "image_size": 8, "patch_size": 4}
    text = {**SIZE, **TEXTS, "max_position_embeddings": 16, "eos_token_id": 59}
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    texts = [torch.cat([ids(length, length), torch.tensor([59])]) for length in (8, 4, 6)]
    return model, [{"input_ids": t, "pixel_values": p} for t, p in zip(texts, pictures(3, 8), strict=True)]


def llava():
    """Four patches of each picture stand in the text."""
    vision = tf.CLIPVisionConfig(**SIZE, image_size=8, patch_size=4)
    text = tf.LlamaConfig(**SIZE, **TEXTS)
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=55, vision_feature_layer=-1)
    )
    samples = []
    for length, picture in zip((7, 3, 5), pictures(3, 8), strict=True):
        samples.append({"input_ids": torch.cat([torch.full((4,), 55), ids(length, length)]), "pixel_values": picture})
    return model, samples


def captions(model):
    texts = [ids(length, length) for length in (7, 3, 5)]
    return model, [{"input_ids": t, "pixel_values": p} for t, p in zip(texts, pictures(3, 8), strict=True)]


def vilt():
    """Text and patches stand in one row, the text first; the mask is given for the text alone."""
    own = {"image_size": 8, "patch_size": 4, "max_position_embeddings": 16, "max_image_length": -1, "num_labels": 3}
    return captions(tf.ViltForQuestionAnswering(tf.ViltConfig(**SIZE, **TEXTS, **own)))


def git():
    """The same, the patches first."""
    vision = {**SIZE, "image_size": 8, "patch_size": 4}
    return captions(tf.GitForCausalLM(tf.GitConfig(vision_config=vision, **SIZE, **TEXTS, max_position_embeddings=16)))


def wav2vec2():
    own = {"conv_dim": [8, 8], "conv_kernel": [4, 3], "conv_stride": [2, 2], "feat_extract_norm": "layer"}
    own |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 20}
    model = tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**SIZE, **own))
    generator = torch.Generator().manual_seed(0)
    return model, [{"input_values": torch.randn(length, generator=generator)} for length in (60, 35, 48)]


class Expert(nn.Module):
    def __init__(self, n=16, hidden=24):
        super().__init__()
        self.w1, self.w3 = nn.Linear(n, hidden, bias=False), nn.Linear(n, hidden, bias=False)
        self.w2 = nn.Linear(hidden, n, bias=False)

    def forward(self, hidden_states):
        return self.w2(nn.functional.silu(self.w1(hidden_states)) * self.w3(hidden_states))


class Routed(nn.Module):
    """As Mixtral's block was before its experts were fused: each gets the rows that are routed to it."""

    def __init__(self, n=16, experts=4):
        super().__init__()
        self.gate = nn.Linear(n, experts, bias=False)
        self.experts = nn.ModuleList(Expert(n) for _ in range(experts))

    def forward(self, hidden_states):
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, chosen = self.gate(rows).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            slot, token = torch.where(number == chosen.T)
            if len(token):
                out.index_add_(0, token, expert(rows[token]) * weights[token, slot, None])
        return out.reshape(hidden_states.shape)


class RoutedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.block_sparse_moe = nn.Linear(16, 16), Routed()

    def forward(self, hidden_states):
        count = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        hidden_states = hidden_states + self.mix(hidden_states.cumsum(dim=1) / count)
        return hidden_states + self.block_sparse_moe(hidden_states)


class RoutedModel(nn.Module):
    """A causal model without transformers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 16)
        self.layers = nn.ModuleList(RoutedBlock() for _ in range(2))
        self.head = nn.Linear(16, 60)

    def forward(self, input_ids, attention_mask=None):
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.head(hidden_states)


def routed():
    model, samples = decoder_only(RoutedModel())
    more = [{"input_ids": ids(12, seed)} for seed in (1, 2, 3)]
    return model, samples + more


FAMILIES = [
    llama, qwen3, gemma3, gpt2, bert, roberta, t5, bart, whisper, vit, clip, llava, vilt, git, wav2vec2, routed, mamba,
]  # fmt: skip
PADDING = {"labels": -100, "input_ids": 0, "input_values": 0.0, "attention_mask": 0}


def together(samples):
    """One batch, padded on the right."""
    batch = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        rows = values[0].ndim == 1
        batch[key] = nn.utils.rnn.pad_sequence(values, True, PADDING[key]) if rows else torch.stack(values)
    for key in ("input_ids", "input_values"):
        if key in batch:
            lengths = torch.tensor([len(sample[key]) for sample in samples])
            batch["attention_mask"] = (torch.arange(batch[key].shape[1]) < lengths[:, None]).long()
    return batch


def alone(sample):
    return {key: value[None] for key, value in sample.items()}


def made(family):
    """The model in evaluation mode and its samples, in fp64 where transformers can."""
    torch.manual_seed(0)
    model, samples = family()
    older = int(tf.__version__.partition(".")[0]) < 5
    dtype = torch.float32 if older and family is clip else torch.float64  # there CLIP's mask overflows in fp64
    model = model.to(dtype).eval()
    return model, [{k: v.to(dtype) if v.is_floating_point() else v for k, v in s.items()} for s in samples]


def lora_of(model):
    if isinstance(model, RoutedModel):
        return LoraConfig(r=2, lora_alpha=4, target_modules=["mix", "gate", "w1", "w2", "w3"])
    exclude = ["dt_proj", "out_proj"] if isinstance(model, tf.MambaForCausalLM) else None  # whose weights it reads
    if isinstance(model, tf.WhisperForConditionalGeneration | tf.CLIPModel):
        return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    return LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", exclude_modules=exclude)


def run(model, batch):
    with torch.no_grad():
        output = model(**batch)
    return (
        next(getattr(output, key) for key in ("logits", "logits_per_image") if hasattr(output, key))
        if not isinstance(output, torch.Tensor)
        else output
    )


def moments_alone(model, samples, names, heard=lambda name, sample, tokens: tokens):
    """Mean over samples of x x^T over their tokens, each sample divided by its largest input, as peft does."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda layer, args, name=name: seen[name].append(args[0]))
        for name in names
    ]
    sums, counts, tokens = {}, {}, {}
    for sample in samples:
        for inputs in seen.values():
            inputs.clear()
        run(model, alone(sample))
        for name in names:
            for x in seen[name]:
                x = heard(name, sample, x.reshape(-1, x.shape[-1]))
                scaled = x / x.max().abs()
                sums[name] = sums.get(name, 0) + sum(torch.outer(token, token) for token in scaled)
                counts[name] = counts.get(name, 0) + 1
                tokens[name] = tokens.get(name, 0) + len(x)
    for hook in hooks:
        hook.remove()
    return {name: total / counts[name] for name, total in sums.items()}, tokens


def heard_by_whisper(name, sample, tokens):
    """One token of the encoder for two frames; so also where the decoder attends to it."""
    sound = ".encoder." in name or name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
    return tokens[: (int(sample["attention_mask"].sum()) + 1) // 2] if sound else tokens
