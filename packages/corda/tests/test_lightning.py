"""The Lightning callback: started in setup, interrupted, resumed, converted."""

import copy

import lightning as L
import pytest
import torch
from corda import CordaCallback
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from tenfold import UserError

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


class Module(L.LightningModule):
    def __init__(self, base):
        super().__init__()
        self.model = get_peft_model(copy.deepcopy(base), LORA)

    def training_step(self, batch, _):
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(base, batches, folder, epochs, resume=None, attach="anchor", callback=None):
    rows = torch.cat([batch["input_ids"] for batch in batches])
    callback = callback or CordaCallback(batches, attach=attach, folder=folder)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Module(base)
    trainer.fit(module, DataLoader(rows, batch_size=2), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return module


@pytest.mark.parametrize("attach", ["anchor", "residual"])
def test_a_fit_in_two_parts_ends_with_the_adapter_of_one_fit(llama, batches, tmp_path, attach):
    whole = fit(llama, batches, tmp_path / "a", 2, attach=attach)
    fit(llama, batches, tmp_path / "b", 1, attach=attach)
    fit(llama, batches, tmp_path / "b", 2, resume=tmp_path / "b/last.ckpt", attach=attach)
    a, b = (load_file(tmp_path / run / "lora" / "adapter_model.safetensors") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    plain = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "a" / "lora").eval()
    with torch.no_grad():
        expected = whole.model.eval()(**batches[0]).logits
        torch.testing.assert_close(plain(**batches[0]).logits, expected, atol=1e-5, rtol=1e-4)
        assert (llama.eval()(**batches[0]).logits - expected).abs().max() > 1e-2


def test_another_base_or_no_model_is_refused(llama, batches, tmp_path):
    fit(llama, batches, tmp_path, 1)
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight += 0.1
    with pytest.raises(UserError, match="another base model"):
        fit(other, batches, tmp_path, 2, resume=tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="Module has no attribute 'net'"):
        fit(llama, batches, tmp_path, 1, callback=CordaCallback(batches, model="net", folder=tmp_path))
