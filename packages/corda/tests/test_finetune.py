"""Fine-tuning from several starts: equal conditions, a stop at the target, starts that compute what the model did."""

import copy

import pytest
import torch
from corda import CordaInit, apply_corda, build_factors, collect_context
from corda.commands._finetune import ARMS, FinetuneSettings, Trajectory, attach_arm, finetune
from peft import LoraConfig, get_peft_model

from tenfold import NonFiniteError, UserError

LORA = LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def labeled(batches):
    return [{**batch, "labels": batch["input_ids"]} for batch in batches]


def held_out(batch):
    return lambda model: {"loss": model(**batch).loss.item()}


def test_it_is_adamw_at_a_constant_rate_after_a_linear_warm_up(llama, labeled):
    torch.manual_seed(0)
    adapted = get_peft_model(llama.eval(), LORA)
    literal = copy.deepcopy(adapted)
    # so small a norm that AdamW's eps counts, since AdamW does not feel the size of a gradient otherwise
    settings = FinetuneSettings(learning_rate=1e-2, steps=5, validate_every=2, warm_up=2, max_grad_norm=1e-6)
    trajectory = finetune(adapted, labeled, held_out(labeled[0]), settings)
    expected = [literal(**labeled[0]).loss.item()]
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in literal.parameters() if p.requires_grad}
    for step in range(5):
        grads = torch.autograd.grad(literal(**labeled[step % 3]).loss, list(moments))
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        for g, (p, (mean, square)) in zip(grads, moments.items(), strict=True):
            g = g * min(1, 1e-6 / norm)
            mean += 0.1 * (g - mean)
            square += 0.001 * (g**2 - square)
            rate = 1e-2 * min(1, (step + 1) / 2)
            corrected = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            p.data -= rate * mean / (1 - 0.9 ** (step + 1)) / corrected
        expected.append(literal(**labeled[0]).loss.item())
    assert trajectory.steps == [0, 2, 4, 5]
    assert trajectory.metrics["loss"] == pytest.approx([expected[i] for i in trajectory.steps], rel=1e-4)


def test_it_stops_at_the_target_and_trains_nothing_but_the_adapter(llama, labeled):
    adapted = attach_arm("pissa", llama, LORA)
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    losses = iter([3.0, 2.0, 1.0, 0.5])
    settings = FinetuneSettings(learning_rate=1e-3, steps=50, validate_every=1, target_loss=1.0)
    trajectory = finetune(adapted, labeled, lambda model: {"loss": next(losses), "kept": 7.0}, settings)
    assert trajectory == Trajectory([0, 1, 2], {"loss": [3.0, 2.0, 1.0], "kept": [7.0] * 3})
    for name, p in adapted.named_parameters():
        assert torch.equal(p, before[name]) == (".lora_" not in name)


def test_dropout_counts_in_training_only(llama, labeled):
    modes = []
    watched = attach_arm("lora", llama, LORA)
    watched.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    finetune(watched, labeled, held_out(labeled[0]), FinetuneSettings(learning_rate=1e-3, steps=2, validate_every=2))
    assert modes == [False, True, True, False]


def test_values_at_a_loss_lie_on_the_line_between_two_evaluations():
    trajectory = Trajectory([0, 10, 20, 30], {"loss": [3.0, 2.0, 2.5, 1.0], "kept": [100.0, 80.0, 70.0, 10.0]})
    assert trajectory.at(2.25) == {"step": 7.5, "loss": 2.25, "kept": 85.0}  # where it first comes down to it
    assert trajectory.at(1.75) == {"step": 25.0, "loss": 1.75, "kept": 40.0}
    assert trajectory.at(4.0) == {"step": 0.0, "loss": 3.0, "kept": 100.0}
    assert trajectory.at(0.9) is None


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_starts_at_the_function_of_the_model(name, llama, batches):
    keep, learn = collect_context(llama, batches), collect_context(llama, batches[:1])
    expected = llama.eval()(**batches[0]).logits
    adapted = attach_arm(name, copy.deepcopy(llama), LORA, keep=keep, learn=learn, init=CordaInit(balance="balanced"))
    torch.testing.assert_close(adapted.eval()(**batches[0]).logits, expected, rtol=1e-4, atol=1e-5)
    linear = [m.weight for m in llama.model.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == sum(2 * sum(w.shape) for w in linear)
    if name == "lora":
        assert not any(p.any() for key, p in adapted.named_parameters() if ".lora_B" in key)
        return
    init = CordaInit(mode=name[-3:] if "corda" in name else {"pissa": "ipm", "milora": "kpm"}[name], balance="balanced")
    stats = {"corda-kpm": keep, "corda-ipm": learn}.get(name)
    init = init if stats else CordaInit(mode=init.mode, power=0, balance="balanced")
    by_hand = apply_corda(llama, build_factors(llama, stats, LORA, init), LORA)
    for (key, ours), theirs in zip(adapted.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs), key


def test_settings_of_statistics_do_not_hinder_arms_without_them(llama):
    plain = attach_arm("milora", copy.deepcopy(llama), LORA)
    adapted = attach_arm("milora", llama, LORA, init=CordaInit(accumulate="cross"))
    for (key, ours), theirs in zip(adapted.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), key


def test_faults_are_named(llama, labeled):
    with pytest.raises(UserError, match=r"unknown arm 'corda_kpm': .*corda-kpm"):
        attach_arm("corda_kpm", llama, LORA)
    for name, verb in (("corda-kpm", "kept"), ("corda-ipm", "learned")):
        with pytest.raises(UserError, match=f"arm {name} needs the statistics of what is to be {verb}"):
            attach_arm(name, llama, LORA)
    for settings in ({"learning_rate": 0.0, "steps": 1}, {"learning_rate": 1.0, "steps": 0}):
        with pytest.raises(UserError, match="expected"):
            FinetuneSettings(**settings)
    adapted = attach_arm("lora", llama, LORA)
    settings = FinetuneSettings(learning_rate=1e30, steps=20, warm_up=0, max_grad_norm=1e30)
    with pytest.raises(NonFiniteError, match=r"fine-tuning: the loss is nan at step \d+, learning rate 1e\+30"):
        finetune(adapted, labeled, held_out(labeled[0]), settings)
