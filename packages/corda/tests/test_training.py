"""The callbacks: started inside a trainer, killed, resumed, and what plain peft makes of the outcome."""

import copy
import os
import signal
import subprocess
import sys

import pytest
import torch
from corda import CordaInit, CordaTrainerCallback, FactorSet, apply_corda, build_factors, collect_context
from corda.fingerprints import fingerprint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from tenfold import UserError

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
STEPS = 6


class Interrupted(Exception):
    """Raised in place of a kill."""


class StopAt(TrainerCallback):
    def __init__(self, step, deed):
        self.step, self.deed = step, deed

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.deed()


def interrupt():
    raise Interrupted


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def rows(batches):
    ids = torch.cat([batch["input_ids"] for batch in batches])
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(base, batches, folder, *callbacks, config=None, **settings):
    """Over a fresh copy of the base, wrapped by peft as a trainer like TRL's would."""
    torch.manual_seed(5)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        seed=3,
        **settings,
    )
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config or LORA))
    return Trainer(model=model, args=arguments, train_dataset=rows(batches), callbacks=list(callbacks))


@pytest.mark.parametrize("attach", ["anchor", "residual"])
def test_interrupted_and_resumed_it_ends_with_the_same_adapter_for_the_untouched_base(llama, batches, tmp_path, attach):
    unbroken = trainer(llama, batches, tmp_path / "a", CordaTrainerCallback(batches, attach=attach))
    unbroken.train()
    with pytest.raises(Interrupted):
        trainer(
            llama, batches, tmp_path / "b", CordaTrainerCallback(batches, attach=attach), StopAt(5, interrupt)
        ).train()
    assert not (tmp_path / "b" / "lora").exists()
    resumed = trainer(llama, batches, tmp_path / "b", CordaTrainerCallback(batches, attach=attach))
    resumed.train(resume_from_checkpoint=True)
    a, b = (load_file(tmp_path / run / "lora" / "adapter_model.safetensors") for run in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    plain = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "a" / "lora").eval()
    with torch.no_grad():
        expected = unbroken.model.eval()(**batches[0]).logits
        torch.testing.assert_close(plain(**batches[0]).logits, expected, atol=1e-5, rtol=1e-4)
        assert (llama.eval()(**batches[0]).logits - expected).abs().max() > 1e-2  # it has been trained


@pytest.mark.parametrize("attach", ["anchor", "residual"])
def test_it_starts_at_the_factors_of_the_base_and_untrained_converts_to_no_change(llama, batches, tmp_path, attach):
    init = CordaInit(mode="ipm")
    run = trainer(llama, batches, tmp_path, CordaTrainerCallback(batches, init, attach=attach))
    run.args.learning_rate = 0.0
    run.args.max_steps = 1
    run.train()
    stats = collect_context(copy.deepcopy(llama), batches, init=init)
    factors = build_factors(llama, stats, LORA, init)
    started = FactorSet.load(tmp_path / "corda_start.safetensors")
    for name, found in factors.factors.items():
        torch.testing.assert_close(started.factors[name].A, found.A, rtol=1e-5, atol=1e-6)
    by_hand = apply_corda(copy.deepcopy(llama), factors, LORA).eval()
    with torch.no_grad():
        ours = run.model.eval()(**batches[0]).logits
        torch.testing.assert_close(ours, by_hand(**batches[0]).logits, rtol=1e-4, atol=1e-5)
        if attach == "anchor":
            assert torch.equal(ours, llama.eval()(**batches[0]).logits)
    written = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name in factors.factors:
        A, B = (written[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert not torch.cat([B[:, 4:].flatten(), A[:4].flatten()]).any()  # [B0, 0] [0; A]


def test_a_killed_process_resumes_to_the_numbers_of_an_unbroken_one(llama, batches, tmp_path):
    """The process is killed by SIGKILL; the resumed one finds only what is on disk."""
    llama.save_pretrained(tmp_path / "model")
    torch.save(batches, tmp_path / "batches.pt")
    program = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch
from transformers import LlamaForCausalLM
from test_training import *
batches = torch.load({str(tmp_path / "batches.pt")!r})
base = LlamaForCausalLM.from_pretrained({str(tmp_path / "model")!r})
trainer(base, batches, {str(tmp_path / "b")!r}, CordaTrainerCallback(batches), StopAt(5, kill)).train()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for folder, resume in (("a", None), ("b", True)):
        run = trainer(llama, batches, tmp_path / folder, CordaTrainerCallback(batches))
        run.train(resume_from_checkpoint=resume)
    a, b = (load_file(tmp_path / run / "lora" / "adapter_model.safetensors") for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def interrupted(llama, batches, tmp_path):
    """Folder of a run that stopped after its first checkpoint."""
    with pytest.raises(Interrupted):
        trainer(llama, batches, tmp_path / "run", CordaTrainerCallback(batches), StopAt(3, interrupt)).train()
    return tmp_path / "run"


def test_resuming_on_another_base_or_start_is_refused(llama, batches, interrupted):
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight += 0.1
    with pytest.raises(UserError, match="another base model"):
        trainer(other, batches, interrupted, CordaTrainerCallback(batches)).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match="attach='anchor', not 'residual'"):
        trainer(llama, batches, interrupted, CordaTrainerCallback(batches, attach="residual")).train(
            resume_from_checkpoint=True
        )
    stats = collect_context(llama, batches[:1])
    build_factors(llama, stats, LORA).save(interrupted / "corda_start.safetensors")
    with pytest.raises(UserError, match="belongs to another run"):
        trainer(llama, batches, interrupted, CordaTrainerCallback(batches)).train(resume_from_checkpoint=True)
    (interrupted / "corda_start.safetensors").unlink()
    with pytest.raises(UserError, match="no such file"):
        trainer(llama, batches, interrupted, CordaTrainerCallback(batches)).train(resume_from_checkpoint=True)


def test_a_checkpoint_is_no_plain_lora_and_plain_peft_says_so(llama, interrupted):
    with pytest.raises(ValueError, match="Unknown initialization init_lora_weights=.anchored_corda"):
        PeftModel.from_pretrained(llama, interrupted / "checkpoint-2")


def test_a_model_that_it_cannot_start_is_refused(llama, batches, tmp_path):
    run = trainer(llama, batches, tmp_path / "a", CordaTrainerCallback(batches))
    run.model = run.model_wrapped = run.model.unload()
    with pytest.raises(UserError, match="expected a model that peft has wrapped"):
        run.train()
    run = trainer(llama, batches, tmp_path / "b", CordaTrainerCallback(batches))
    layer = run.model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    with pytest.raises(UserError, match="started or trained already"):
        run.train()
    with pytest.raises(UserError, match="needs calibration data"):
        trainer(llama, batches, tmp_path / "c", CordaTrainerCallback(None)).train()
    with pytest.raises(UserError, match="unknown attach 'anker'"):
        CordaTrainerCallback(batches, attach="anker")


@pytest.mark.parametrize("attach", ["anchor", "residual"])
def test_what_save_model_writes_afterwards_is_what_plain_peft_loads(llama, batches, tmp_path, attach):
    """Biases, rsLoRA and patterns of rank included; the base under the adapter is the untouched one again."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        bias="all",
        rank_pattern={"up_proj": 2},
        target_modules=["q_proj", "up_proj"],
    )
    run = trainer(llama, batches, tmp_path, CordaTrainerCallback(batches, attach=attach), config=config)
    run.train()
    run.save_model(tmp_path / "saved")
    with torch.no_grad():
        trained = run.model.eval()(**batches[0]).logits
        plain = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "saved").eval()
        torch.testing.assert_close(plain(**batches[0]).logits, trained, atol=1e-5, rtol=1e-4)
        assert (llama.eval()(**batches[0]).logits - trained).abs().max() > 1e-2
    assert plain.peft_config["default"].init_lora_weights is True
    under = run.model.get_base_model().state_dict()
    for name, value in llama.state_dict().items():
        torch.testing.assert_close(under.get(name, under.get(name.replace(".weight", ".base_layer.weight"))), value)
    run.train()  # goes on with the plain LoRA, and saves it so
    again = PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            again(**batches[0]).logits, run.model.eval()(**batches[0]).logits, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("attach", ["anchor", "residual"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": ["lm_head"], "modules_to_save": None}, "shares its weight with another layer"),
        ({"target_modules": ["embed_tokens"]}, "Embedding.*exclude_modules"),
    ],
)
def test_what_the_end_would_refuse_is_refused_before_the_first_step(llama, batches, tmp_path, attach, options, message):
    if options.get("target_modules") == ["lm_head"]:
        llama.lm_head.weight = llama.model.embed_tokens.weight
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | options)
    run = trainer(llama, batches, tmp_path, CordaTrainerCallback(batches, attach=attach), config=config)
    with pytest.raises(UserError, match=message):
        run.train()
    assert run.state.global_step == 0
    assert not list(tmp_path.glob("lora"))


@pytest.mark.parametrize("mark", ["ds_id", "device_mesh"])
def test_weights_that_are_sharded_over_ranks_are_refused_before_the_first_step(llama, batches, tmp_path, mark):
    """As DeepSpeed marks a parameter of ZeRO-3, and torch one of FSDP."""
    run = trainer(llama, batches, tmp_path, CordaTrainerCallback(batches))
    setattr(run.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight, mark, 0)
    with pytest.raises(UserError, match=r"sharded over ranks \(ZeRO-3, FSDP\).*corda init"):
        run.train()
    assert run.state.global_step == 0


def test_factors_on_disk_are_the_factors(llama, batches, tmp_path):
    factors = build_factors(llama, collect_context(llama, batches), LORA)
    factors.save(tmp_path / "factors.safetensors")
    loaded = type(factors).load(tmp_path / "factors.safetensors")
    assert (loaded.targets, loaded.layers, loaded.init) == (factors.targets, factors.layers, factors.init)
    assert loaded.fingerprint == fingerprint(llama)
    for name, found in factors.factors.items():
        for part in ("A", "B", "left", "sigma"):
            assert torch.equal(getattr(loaded.factors[name], part), getattr(found, part))
    with pytest.raises(UserError, match=r"holds corda\.factors, expected corda\.context"):
        type(collect_context(llama, batches)).load(tmp_path / "factors.safetensors")
