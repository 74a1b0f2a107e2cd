"""The command line with models that are no causal ones, and with layers that are chosen one by one."""

import json
import shutil

import pytest
import torch
import transformers as tf
from conftest import VOCABULARY
from corda.cli import main
from corda_families import SIZE
from peft import PeftModel

from tenfold.testing import assert_user_error

LETTERS = {"vocab_size": len(VOCABULARY) + 1}


def bert():
    return tf.BertForSequenceClassification(tf.BertConfig(**SIZE, **LETTERS, num_labels=3))


def tagger():
    return tf.BertForTokenClassification(tf.BertConfig(**SIZE, **LETTERS, num_labels=3))


def t5():
    config = tf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, **LETTERS)
    return tf.T5ForConditionalGeneration(config)


def llava():
    vision = tf.CLIPVisionConfig(**SIZE, image_size=8, patch_size=4)
    text = tf.LlamaConfig(**SIZE, **LETTERS)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=len(VOCABULARY))
    )


TASKS = {
    "sequence-classification": (bert, tf.AutoModelForSequenceClassification, []),
    "token-classification": (tagger, tf.AutoModelForTokenClassification, []),
    "seq2seq": (t5, tf.AutoModelForSeq2SeqLM, []),
    "image-text": (llava, tf.AutoModelForImageTextToText, ["--exclude", "vision_tower,multi_modal_projector"]),
}


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"what is number {i}?", "answer": "nine " * (i % 3 + 1)} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return ["--data", f"jsonl:{path}", "--calibration.pack", "0", "--calibration.batch_size", "3", "--device", "cpu"]


@pytest.mark.filterwarnings("ignore:.*is not streamed")
@pytest.mark.parametrize("task", TASKS)
def test_a_model_of_any_task_is_calibrated_started_verified_and_loaded(task, words, shared_folder, tmp_path):
    make, auto, more = TASKS[task]
    folder = tmp_path / "model"
    shutil.copytree(shared_folder, folder)
    torch.manual_seed(0)
    make().save_pretrained(folder)
    same = ["--model", f"hf:{folder}", "--task", task, *more]
    assert main(["init", *same, *words, "--r", "2", "--out", str(tmp_path / "start")]) == 0
    assert json.loads((tmp_path / "start/corda_report.json").read_text())["task"] == task
    checked = ["verify", "--model", f"hf:{folder}", "--run", str(tmp_path / "start"), "--calibration.pack", "16"]
    assert main([*checked, "--strict", "--device", "cpu", "--out", str(tmp_path / "checked")]) == 0
    loaded = PeftModel.from_pretrained(
        auto.from_pretrained(tmp_path / "start/residual"), str(tmp_path / "start/corda_init")
    )
    assert loaded.peft_config["default"].r == 2


def test_layers_are_chosen_and_given_ranks_one_by_one(words, shared_folder, tmp_path):
    same = ["--model", f"hf:{shared_folder}", "--r", "4", "--targets", "q_proj,v_proj,up_proj", *words]
    more = [
        "--exclude",
        "v_proj",
        "--layers",
        "0",
        "--rank_pattern",
        '{"up_proj": 2}',
        "--alpha_pattern",
        '{"up_proj": 6}',
    ]
    assert main(["init", *same, *more, "--out", str(tmp_path / "start")]) == 0
    layers = json.loads((tmp_path / "start/corda_report.json").read_text())["layers"]
    assert {name.rpartition(".")[2]: (layer["rank"], layer["scaling"]) for name, layer in layers.items()} == {
        "q_proj": (4, 1.0),
        "up_proj": (2, 3.0),
    }


def test_what_does_not_fit_a_task_is_refused_in_one_line(words, shared_folder, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    model = ["--model", f"hf:{shared_folder}"]
    seq = ["init", *model, "--task", "seq2seq", *out]
    texts = ["compare", *model, "--task", "seq2seq", "--keep", "topics", "--learn", "code", *out]
    for line, message in (
        ([*seq, "--data", "topics", "--calibration.pack", "0"], "a text without answers"),
        ([*seq, "--data", words[1]], "give --calibration.pack 0"),
        (texts, "task: expected causal"),
        (["init", *model, "--rank_pattern", '{"q_proj": 0}', *words, *out], "rank_pattern: expected more than 0"),
        (["init", *model, "--layers", "7", *words, *out], "layers: expected --targets by name"),
        (["init", *model, "--layers", "7", "--targets", "q_proj", *words, *out], "peft cannot apply"),
    ):
        assert_user_error(main, line, capsys, message)
