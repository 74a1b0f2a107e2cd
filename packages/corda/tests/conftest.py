import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))  # corda_families

VOCABULARY = sorted({chr(c) for c in range(32, 127)} | {"\n"})


def tiny_llama(layers=2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).train()


@pytest.fixture
def llama():
    """A tiny Llama with grouped-query attention, on purpose not in evaluation mode."""
    return tiny_llama()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, len(VOCABULARY), (2, 24), generator=generator)} for _ in range(3)]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """The model on disk with a tokenizer of one token a character, the same for all tests: to be read only."""
    folder = tmp_path_factory.mktemp("shared") / "model"
    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(VOCABULARY)}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tiny_llama(layers=1).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=characters, unk_token=" ").save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(shared_folder, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(shared_folder, tmp_path / "model")


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n\n" * 20)
    return f"text:{path}"
