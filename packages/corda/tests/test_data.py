import json
import random
import string

import pytest
import torch
from corda.config import Calibration
from corda.data import calibration_batches, load_model, read_texts
from transformers import AutoTokenizer

from tenfold import UserError


@pytest.fixture
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


def lines(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return f"jsonl:{path}"


def test_plain_text_is_split_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\nmore\n\ntwo\n\n\n")
    assert read_texts(f"text:{tmp_path / 'a.txt'}") == ["one\nmore", "two"]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "a", "id": 3}, "a"),
        ({"instruction": "a", "input": "", "output": "c"}, "a\nc"),
        ({"query": "a", "response": "b"}, "a\nb"),
        ({"question": "a"}, "a"),
        ("a", "a"),
    ],
)
def test_known_fields_of_records(tmp_path, record, text):
    assert read_texts(lines(tmp_path / "a.jsonl", record)) == [text]
    (tmp_path / "a.json").write_text(json.dumps([record]))
    assert read_texts(f"json:{tmp_path / 'a.json'}") == [text]


def test_named_fields_and_chat(tmp_path, tokenizer):
    source = lines(tmp_path / "a.jsonl", {"a": "x", "b": "y", "text": "z"})
    assert read_texts(source, ["b", "a"]) == ["y\nx"]
    chat = lines(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": "hello"}]})
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: field messages needs a tokenizer with a chat template"):
        read_texts(chat, None, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert read_texts(chat, None, tokenizer) == ["<user>hello"]


def test_embedded_texts():
    for name in ("topics", "code", "names"):
        assert len(read_texts(name)) >= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        (
            '{"text": "a"}\n{"txet": "b"}',
            r"a\.jsonl, line 2: none of the known fields; name them with --fields \(found: txet",
        ),
        ('{"text": 3}', r"a\.jsonl, line 1, field text: expected text, found int"),
        ("[1]", r"a\.jsonl, line 1: expected an object with named fields, found list"),
        ("\n\n", "no text in it"),
    ],
)
def test_malformed_lines_are_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_texts(f"jsonl:{tmp_path / 'a.jsonl'}")


def test_bad_sources(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for source, message in {
        "jsnol:x": "did you mean jsonl:",
        "topic": "did you mean topics",
        f"text:{tmp_path}/no": "No such file",
        f"text:{tmp_path}/latin": "not UTF-8 at byte 3",
    }.items():
        with pytest.raises(UserError, match=message):
            read_texts(source)
    with pytest.raises(UserError, match="no field 'b': did you mean|no field 'b': known: a"):
        read_texts(lines(tmp_path / "a.jsonl", {"a": "x"}), ["b"])


def test_windows_are_disjoint_pieces_of_the_text(tmp_path, tokenizer):
    text = "".join(random.Random(0).choices(string.ascii_letters, k=1000))
    (tmp_path / "a.txt").write_text(text)
    batches = calibration_batches(
        f"text:{tmp_path / 'a.txt'}", Calibration(pack=50, windows=19, batch_size=8), tokenizer
    )
    assert [len(batch["input_ids"]) for batch in batches] == [8, 8, 3]
    rows = torch.cat([batch["input_ids"] for batch in batches])
    whole = tokenizer(text, return_tensors="pt")["input_ids"][0]
    starts = [int((whole.unfold(0, 50, 1) == row).all(dim=1).nonzero()[0]) for row in rows]
    assert len({start % 50 for start in starts}) == 1
    assert all(batch["attention_mask"].all() for batch in batches)


def test_a_short_text_gives_overlapping_windows_and_a_shorter_one_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x" * 60)
    source = f"text:{tmp_path / 'a.txt'}"
    assert calibration_batches(source, Calibration(pack=50, windows=6), tokenizer)[0]["input_ids"].shape == (4, 50)
    with pytest.raises(UserError, match="60 tokens are less than one window; lower --calibration.pack 64"):
        calibration_batches(source, Calibration(pack=64), tokenizer)


def test_rows_of_their_own_are_padded_and_masked(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abc\n\ndefgh\n\n" + "z" * 30)
    settings = Calibration(pack=0, max_length=10, windows=3, batch_size=3)
    (batch,) = calibration_batches(f"text:{tmp_path / 'a.txt'}", settings, tokenizer)
    assert sorted(batch["attention_mask"].sum(dim=1).tolist()) == [3, 5, 10]
    decoded = {
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert decoded == {"abc", "defgh", "z" * 10}


def test_a_folder_without_a_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        load_model(str(tmp_path))


def test_bad_calibration_settings():
    with pytest.raises(UserError, match="windows must be at least 1"):
        Calibration(windows=0)
    with pytest.raises(UserError, match="pack must be"):
        Calibration(pack=-1)
