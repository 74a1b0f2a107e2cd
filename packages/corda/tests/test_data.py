import itertools
import json
import os
import random
import string
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from corda.commands._models import load_model, load_tokenizer
from corda.config import Calibration
from corda.data import calibration_batches, on_model
from corda.records import read_texts
from transformers import AutoTokenizer

from tenfold import UserError
from tenfold.errors import MissingExtraError

TURNS = [("user", "hello"), ("assistant", "hi")]
CHATS = [
    {"messages": [{"role": role, "content": text} for role, text in TURNS]},
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
    {"conversation": [{"human": "hello", "assistant": "hi"}]},
]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def tokenizer(shared_folder):
    return AutoTokenizer.from_pretrained(shared_folder)


def lines(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))
    return f"jsonl:{path}"


def save_to_disk(folder, table, *, shards=2):
    """What ``datasets`` (5.2) leaves behind: Arrow streams, and their names in state.json."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        part = table.slice(i * len(table) // shards, (i + 1) * len(table) // shards - i * len(table) // shards)
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(part)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return f"dataset:{folder}"


def test_plain_text_is_split_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\nmore\n\ntwo\n\n\n")
    assert read_texts(f"text:{tmp_path / 'a.txt'}") == ["one\nmore", "two"]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "a", "id": 3}, "a"),
        ({"instruction": "a", "input": "", "output": "c"}, "a\nc"),
        ({"instruction": "a", "input": None, "output": "c"}, "a\nc"),
        ({"query": "a", "response": "b"}, "a\nb"),
        ({"question": "a"}, "a"),
        ({"question": "a", "answer": ["b", "c"]}, "a"),  # as in NQ open
    ],
)
def test_known_fields_of_records_in_every_format(tmp_path, record, text):
    assert read_texts(lines(tmp_path / "a.jsonl", record)) == [text]
    (tmp_path / "a.json").write_text(json.dumps([record]))
    assert read_texts(f"json:{tmp_path / 'a.json'}") == [text]
    table = pyarrow.Table.from_pylist([record] * 3)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_texts(f"parquet:{tmp_path / 'a.parquet'}") == [text] * 3
    assert read_texts(save_to_disk(tmp_path / "a", table)) == [text] * 3


def test_lines_may_be_bare_strings_begin_with_a_mark_and_hold_odd_separators(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + '"a\u2028b"\r\n\n"c"\n'.encode())
    assert read_texts(f"jsonl:{tmp_path / 'a.jsonl'}") == ["a\u2028b", "c"]


def test_named_fields(tmp_path):
    source = lines(tmp_path / "a.jsonl", {"a": "x", "b": "y", "text": "z"})
    assert read_texts(source, Calibration(fields=["b", "a"])) == ["y\nx"]


@pytest.mark.parametrize("record", CHATS, ids=lambda record: next(iter(record)))
def test_conversations_are_rendered_by_the_chat_template(tmp_path, tokenizer, record):
    source = lines(tmp_path / "a.jsonl", record)
    (field,) = record
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1, field {field}: needs a chat template"):
        read_texts(source, None, tokenizer)
    assert read_texts(source, Calibration(chat_template="plain"), tokenizer) == ["hello\nhi"]
    (tmp_path / "template").write_text(TEMPLATE)
    for template in (TEMPLATE, str(tmp_path / "template")):
        assert read_texts(source, Calibration(chat_template=template), tokenizer) == ["<user>hello<assistant>hi"]
    tokenizer.chat_template = TEMPLATE
    assert read_texts(source, None, tokenizer) == ["<user>hello<assistant>hi"]


def test_pairs_become_turns_when_a_chat_template_is_asked_for(tmp_path, tokenizer):
    tokenizer.chat_template = TEMPLATE
    source = lines(tmp_path / "a.jsonl", {"instruction": "a", "input": "b", "output": "c"})
    assert read_texts(source, None, tokenizer) == ["a\nb\nc"]
    assert read_texts(source, Calibration(chat_template="tokenizer"), tokenizer) == ["<user>a\nb<assistant>c"]


def test_the_token_of_a_beginning_comes_once(tmp_path, tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "^"
    begins = TemplateProcessing(single="^ $A", special_tokens=[("^", tokenizer.bos_token_id)])
    tokenizer._tokenizer.post_processor = begins
    assert tokenizer("ab")["input_ids"][0] == tokenizer.bos_token_id
    source = lines(tmp_path / "a.jsonl", CHATS[0])
    settings = Calibration(chat_template="{{ bos_token }}" + TEMPLATE, pack=0)
    assert read_texts(source, settings, tokenizer) == ["<user>hello<assistant>hi"]
    ((batch,),) = calibration_batches(source, settings, tokenizer)
    assert (batch["input_ids"] == tokenizer.bos_token_id).sum() == 1


def test_embedded_texts():
    for name in ("topics", "code", "names"):
        assert len(read_texts(name)) >= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        (
            b'{"text": "a"}\n{"txet": "b"}',
            r"a\.jsonl, line 2: none of the known fields; name them with --calibration.fields \(found: txet",
        ),
        (b'{"text": 3}', r"a\.jsonl, line 1, field text: expected text, found int"),
        (b"[1]", r"a\.jsonl, line 1: expected an object with named fields, found list"),
        (b'{"text": "abc\xe9"}', r"a\.jsonl, line 1: not UTF-8 at byte 13"),
        (b'{"input_ids": [1, -2]}', r"line 1, field input_ids: expected a list of token numbers"),
        (b'{"input_ids": [1], "attention_mask": []}', r"field attention_mask: expected one entry for each of 1 token"),
        (b'{"text": "a"}\n{"input_ids": [1]}', r"line 2: input_ids, where the records before hold text"),
        (b'{"messages": "hi"}', r"line 1, field messages: expected a list of turns, found str"),
        (
            b'{"messages": [{"role": "usr", "content": "a"}]}',
            r"field messages, turn 0: unknown role 'usr': did you mean",
        ),
        (b'{"conversations": [{"from": "gpt"}]}', r"field conversations, turn 0: expected text, found NoneType"),
        (b'{"conversation": [{"robot": "a"}]}', r"field conversation, turn 0: expected one of system, human"),
        (b"\n\n", "no text in it"),
    ],
)
def test_malformed_lines_are_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_texts(f"jsonl:{tmp_path / 'a.jsonl'}", Calibration(chat_template="plain"))


def test_malformed_records_are_skipped_counted_and_told_on_request(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": \n{"text": "\xe9"}\n{"txet": "b"}\n{"text": "c"}')
    with pytest.warns(UserWarning, match="skipped 3 records, kept 2; the first skipped: .*line 2: not JSON"):
        assert read_texts(f"jsonl:{tmp_path / 'a.jsonl'}", Calibration(skip_bad=True)) == ["a", "c"]
    (tmp_path / "a.json").write_text('[{"text": "a"}, 3]')
    with pytest.raises(UserError, match=r"a\.json, item 1: expected an object"):
        read_texts(f"json:{tmp_path / 'a.json'}")
    with pytest.warns(UserWarning, match="skipped 1 records, kept 1"):
        assert read_texts(f"json:{tmp_path / 'a.json'}", Calibration(skip_bad=True)) == ["a"]


def test_bad_sources(tmp_path):
    (tmp_path / "latin").write_bytes(b"abc\xe9")
    (tmp_path / "lines").write_text("{}\n{}")
    (tmp_path / "empty").mkdir()
    table = pyarrow.table({"text": ["a", "b"]})
    save_to_disk(tmp_path / "splits/train", table)
    (tmp_path / "splits/dataset_dict.json").write_text('{"splits": ["train"]}')
    save_to_disk(tmp_path / "evil", table)
    (tmp_path / "evil/state.json").write_text('{"_data_files": [{"filename": "../splits/train/state.json"}]}')
    save_to_disk(tmp_path / "cut", table)
    os.truncate(tmp_path / "cut/data-00000-of-00002.arrow", 100)
    for source, message in {
        "jsnol:x": "did you mean jsonl",
        "topic": "did you mean topics",
        f"text:{tmp_path}/no": "no such file",
        f"jsonl:{tmp_path}/no": "no such file",
        f"text:{tmp_path}": "Is a directory",
        f"text:{tmp_path}/latin": "not UTF-8 at byte 3",
        f"json:{tmp_path}/lines": "lines, line 2: not JSON .*; one object a line is jsonl:",
        f"parquet:{tmp_path}/no": "no such file",
        f"parquet:{tmp_path}/latin": "latin: not a whole parquet file",
        f"dataset:{tmp_path}/empty": "no state.json in it",
        f"dataset:{tmp_path}/splits": "holds the splits train: give one of them, dataset:.*splits/train",
        f"dataset:{tmp_path}/evil": "leads outside of the folder",
        f"dataset:{tmp_path}/cut": "not a whole file of a dataset",
    }.items():
        with pytest.raises(UserError, match=message):
            read_texts(source)
    with pytest.raises(UserError, match="no field 'b': did you mean|no field 'b': known: a"):
        read_texts(lines(tmp_path / "a.jsonl", {"a": "x"}), Calibration(fields=["b"]))
    with pytest.raises(UserError, match="chat_template no/such: expected tokenizer, plain, a Jinja template or a file"):
        read_texts(lines(tmp_path / "a.jsonl", CHATS[0]), Calibration(chat_template="no/such"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for kind in ("parquet", "dataset"):
        with pytest.raises(MissingExtraError, match=rf'{kind}: needs pyarrow.*pip install "corda\[data\]"'):
            read_texts(f"{kind}:{tmp_path}")


def test_windows_are_disjoint_pieces_of_the_text(tmp_path, tokenizer):
    text = "".join(random.Random(0).choices(string.ascii_letters, k=1000))
    (tmp_path / "a.txt").write_text(text)
    settings = Calibration(pack=50, windows=19, batch_size=8)
    (batches,) = calibration_batches(f"text:{tmp_path / 'a.txt'}", settings, tokenizer)
    assert [len(batch["input_ids"]) for batch in batches] == [8, 8, 3]
    rows = torch.cat([batch["input_ids"] for batch in batches])
    whole = tokenizer(text, return_tensors="pt")["input_ids"][0]
    starts = [int((whole.unfold(0, 50, 1) == row).all(dim=1).nonzero()[0]) for row in rows]
    assert len({start % 50 for start in starts}) == 1
    assert all(batch["attention_mask"].all() for batch in batches)


def test_parts_hold_every_window_once(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(random.Random(0).choices(string.ascii_letters, k=1000)))
    source = f"text:{tmp_path / 'a.txt'}"
    settings = Calibration(pack=50, windows=10, batch_size=2)
    (whole,) = calibration_batches(source, settings, tokenizer)
    parts = calibration_batches(source, settings, tokenizer, parts=4)
    assert [sum(len(batch["input_ids"]) for batch in part) for part in parts] == [3, 3, 2, 2]
    rows = [[tuple(row) for batch in part for row in batch["input_ids"].tolist()] for part in (*parts, whole)]
    assert sorted(row for part in rows[:-1] for row in part) == sorted(rows[-1])
    with pytest.raises(UserError, match="1 rows cannot be split into 2 parts"):
        calibration_batches(source, Calibration(pack=0), tokenizer, parts=2)


def test_of_a_long_text_random_stretches_are_read(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("corda.data.PIECE", 64)
    (tmp_path / "a.txt").write_text("".join(chr(32 + i % 94) * 64 for i in range(94 * 94)))
    (batches,) = calibration_batches(f"text:{tmp_path / 'a.txt'}", Calibration(pack=64, windows=50), tokenizer)
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert rows.shape == (50, 64)
    assert len(rows.unique()) > 30
    firsts = rows[:, 0].tolist()
    assert len({(b - a) % 94 for a, b in itertools.pairwise(firsts)}) > 10


def test_a_short_text_gives_overlapping_windows_and_a_shorter_one_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x" * 60)
    source = f"text:{tmp_path / 'a.txt'}"
    assert calibration_batches(source, Calibration(pack=50, windows=6), tokenizer)[0][0]["input_ids"].shape == (4, 50)
    with pytest.raises(UserError, match="60 tokens are less than one window; lower --calibration.pack 64"):
        calibration_batches(source, Calibration(pack=64), tokenizer)


def test_rows_of_their_own_are_padded_and_masked(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("abc\n\ndefgh\n\n" + "z" * 30)
    settings = Calibration(pack=0, max_length=10, windows=3, batch_size=3)
    ((batch,),) = calibration_batches(f"text:{tmp_path / 'a.txt'}", settings, tokenizer)
    assert sorted(batch["attention_mask"].sum(dim=1).tolist()) == [3, 5, 10]
    decoded = {
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    }
    assert decoded == {"abc", "defgh", "z" * 10}


def test_tokens_need_no_tokenizer(tmp_path, shared_folder):
    records = [{"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0]}, {"input_ids": list(range(10, 16))}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for source in (lines(tmp_path / "a.jsonl", *records), f"parquet:{tmp_path / 'a.parquet'}"):
        settings = Calibration(pack=0, max_length=5, windows=2)
        ((batch,),) = calibration_batches(source, settings, None)
        pairs = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        rows = {tuple(ids[mask.bool()].tolist()) for ids, mask in pairs}
        assert rows == {(5, 6, 7), (10, 11, 12, 13, 14)}
        ((batch,),) = calibration_batches(source, Calibration(pack=9, windows=1), None)
        assert batch["input_ids"].tolist() == [[5, 6, 7, *range(10, 16)]]
    with pytest.raises(UserError, match="text needs a tokenizer, which the model lacks; give records of input_ids"):
        calibration_batches("names", Calibration(), None)
    model = load_model(f"hf:{shared_folder}", "cpu")
    ((batch,),) = calibration_batches(lines(tmp_path / "b.jsonl", {"input_ids": [3, 96]}), Calibration(pack=0), None)
    with pytest.raises(UserError, match="token 96 in the data, but the model knows 96"):
        on_model([batch], model)


def test_a_folder_without_a_model_is_one_line(tmp_path):
    for load in (lambda spec: load_model(spec, "cpu"), load_tokenizer):
        with pytest.raises(UserError, match=f"--model hf:{tmp_path}: "):
            load(f"hf:{tmp_path}")


def test_bad_calibration_settings():
    with pytest.raises(UserError, match="windows: expected 1 or more, got 0"):
        Calibration(windows=0)
    with pytest.raises(UserError, match="pack: expected 0 or more, got -1"):
        Calibration(pack=-1)
    with pytest.raises(UserError, match="fields: expected at least one"):
        Calibration(fields=[])
