"""Lightning as its users know it."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from localrecon import LocalNet, LocalReconModule, SGRConfig, StepOptions, plan_split
from localrecon_test_nets import dropout_mlp, mlp, same, split, vectors, weights
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from tenfold import UserError


def lightning(tmp_path, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)


def batches(count=4, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    items = [
        (torch.randn(6, generator=generator), int(torch.randint(3, (), generator=generator)))
        for _ in range(count * size)
    ]
    return DataLoader(items, batch_size=size)


class Endless(IterableDataset):
    """Data of unknown length."""

    def __init__(self, ends_after=None):
        self.ends_after = ends_after

    def __iter__(self):
        items = list(batches(2).dataset)
        given = 0
        while self.ends_after is None or given < self.ends_after:
            yield items[given % len(items)]
            given += 1


def module(sgr=None, **options):
    return LocalReconModule(split(mlp(), vectors()[0], 2), sgr or SGRConfig(ramp=0), options=StepOptions(**options))


def test_global_step_counts_batches(tmp_path):
    trainer = lightning(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(module(), batches(4))
    assert trainer.global_step == 8


def test_max_steps_ends_the_training(tmp_path):
    trainer, local = lightning(tmp_path, max_steps=5, enable_checkpointing=False), module()
    trainer.fit(local, batches(4))
    assert trainer.global_step == int(local.steps) == 5


def test_a_model_checkpoint_writes_the_best_and_the_training_resumes_from_it(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss", save_top_k=1, save_last=True)
    trainer, local = lightning(tmp_path, max_epochs=3, callbacks=[best]), module(SGRConfig(gate=True), total_steps=12)
    trainer.fit(local, batches(4), batches(2, seed=1))
    assert best.best_model_path.endswith(".ckpt")
    assert best.best_model_score == trainer.callback_metrics["val/loss"]
    halves = module(SGRConfig(gate=True), total_steps=12)
    first = lightning(tmp_path, max_epochs=2, enable_checkpointing=False)
    first.fit(halves, batches(4), batches(2, seed=1))
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = module(SGRConfig(gate=True), total_steps=12)
    second = lightning(tmp_path, max_epochs=3, enable_checkpointing=False)
    second.fit(again, batches(4), batches(2, seed=1), ckpt_path=tmp_path / "half.ckpt")
    assert second.global_step == 12
    assert same(weights(local.net), weights(again.net))


@pytest.mark.parametrize("how", ["max_epochs=-1", "unknown length"])
def test_a_ramp_of_a_training_of_unknown_length_is_refused_in_one_line(tmp_path, how):
    endless = how == "max_epochs=-1"
    trainer = lightning(tmp_path, max_epochs=-1 if endless else 2, enable_checkpointing=False)
    data = batches(2) if endless else DataLoader(Endless(16), batch_size=8)
    with pytest.raises(UserError, match=r"ramp is a share of the training.*total_steps=.*ramp=0"):
        trainer.fit(module(SGRConfig()), data)


@pytest.mark.parametrize("how", ["max_steps", "total_steps", "no ramp"])
def test_data_of_unknown_length_train_with_a_weight_that_never_falls_below_zero(tmp_path, how):
    sgr = SGRConfig(ramp=0.0 if how == "no ramp" else 0.5, anneal_last=0.0 if how == "no ramp" else 0.2)
    local = module(sgr, total_steps=8 if how == "total_steps" else None)
    seen = []
    strength = type(sgr).strength
    local.stepper.sgr = sgr

    class Watching(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append(
                strength(sgr, int(local.steps) - 1, 16 if how == "max_steps" else local.stepper.options.total_steps)
            )

    stop = {"max_steps": 16} if how == "max_steps" else {"max_epochs": 1}
    trainer = lightning(tmp_path, enable_checkpointing=False, callbacks=[Watching()], **stop)
    trainer.fit(local, DataLoader(Endless(None if how == "max_steps" else 128), batch_size=8))
    assert trainer.global_step == 16
    assert min(seen) >= 0
    assert local.trainer.callback_metrics["m2/loss"].isfinite()


def test_forward_test_and_predict_are_the_models(tmp_path):
    local, trainer = module(), lightning(tmp_path, max_epochs=1, enable_checkpointing=False)
    x, _ = vectors()
    trainer.fit(local, batches())
    (measured,) = trainer.test(local, batches(3), verbose=False)
    logits = torch.cat(trainer.predict(local, batches(3)))
    truth = torch.tensor([label for _, label in batches(3).dataset])
    assert measured["test/acc"] == pytest.approx(float((logits.argmax(1) == truth).float().mean()))
    assert measured["test/loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, truth)), rel=1e-5)
    local.eval()
    assert torch.equal(local(x), local.net.model(x))


def test_validation_counts_the_tokens_that_count(tmp_path):
    from localrecon.models import gpt

    torch.manual_seed(0)
    model, tokens = gpt(9, 6, width=16, depth=2), torch.randint(9, (4, 6))
    net = LocalNet(model, plan_split(model, tokens, k=2, measure=False))
    labels = tokens.clone()
    labels[:, 2:] = -100
    trainer = lightning(tmp_path, max_epochs=1, enable_checkpointing=False)
    (found,) = trainer.validate(
        LocalReconModule(net), DataLoader(list(zip(tokens, labels, strict=True)), batch_size=2), verbose=False
    )
    with torch.no_grad():
        right = (model.eval()(tokens)[:, :2].argmax(2) == tokens[:, :2]).float().mean()
    assert found["val/acc"] == pytest.approx(float(right))


def test_lightning_keeps_frozen_layers_as_the_user_has_set_them(tmp_path):
    x, _ = vectors()
    model = dropout_mlp()
    model[0][2].eval()
    net = LocalNet(model, plan_split(model, x, k=2, measure=False))
    lightning(tmp_path, max_epochs=1, enable_checkpointing=False).fit(LocalReconModule(net), batches())
    assert not model[0][2].training
    assert model[1][2].training


def test_dictionaries_of_a_tokenizer_are_batches(tmp_path):
    from transformers import BatchEncoding, BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    rows = [
        {"input_ids": torch.randint(40, (8,)), "attention_mask": torch.ones(8).long(), "labels": torch.tensor(i % 3)}
        for i in range(16)
    ]
    sample = BatchEncoding({"input_ids": torch.randint(40, (4, 8)), "attention_mask": torch.ones(4, 8).long()})
    net = LocalNet(model, plan_split(model, sample, k=2))
    trainer = lightning(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(
        LocalReconModule(net, SGRConfig(ramp=0)), DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=4)
    )
    assert {"m1/loss", "m2/acc", "b1/cos", "val/loss"} <= set(trainer.callback_metrics)
