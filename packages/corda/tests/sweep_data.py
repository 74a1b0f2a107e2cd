"""What `nox -s sweep` tries corda with: a tiny Llama and a few records."""

import json
from pathlib import Path

from conftest import VOCABULARY, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write(folder: Path) -> None:
    """``model`` and ``facts.jsonl``."""
    characters = Tokenizer(models.WordLevel({c: i for i, c in enumerate(VOCABULARY)}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    tiny_llama(layers=1).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=characters, unk_token=" ").save_pretrained(folder / "model")
    records = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}."} for i in range(40)]
    (folder / "facts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
