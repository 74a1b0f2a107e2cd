"""What the layers of each family see, and whether the adapter starts and ends right.

The reference runs each sample alone and without padding, and loops over its tokens.
"""

import copy
import inspect
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from corda import CordaInit, apply_anchor, apply_corda, build_factors, collect_context, stream_factors, to_lora
from corda.targets import resolve_targets
from corda_families import FAMILIES, alone, heard_by_whisper, lora_of, made, moments_alone, run, together
from peft import PeftModel


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.__name__)
def family(request):
    model, samples = made(request.param)
    config = lora_of(model)
    return model, samples, config, list(resolve_targets(model, config))


def test_statistics_of_padded_batches_are_those_of_each_sample_alone(family):
    """Two batches of unequal length; no warning, since every stream is known."""
    model, samples, _, names = family
    heard = {"heard": heard_by_whisper} if isinstance(model, tf.WhisperForConditionalGeneration) else {}
    expected, tokens = moments_alone(model, samples, names, **heard)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = collect_context(model, [together(samples[:2]), together(samples[2:])], names)
    for name in names:
        found = stats.covariance(name)
        assert stats.tokens[stats.groups[name]] == tokens[name], name
        assert (found - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("attach", ["residual", "anchor"])
def test_the_adapter_starts_at_the_model_and_ends_as_what_plain_peft_loads(family, tmp_path, attach):
    model, samples, config, names = family
    batch = together(samples)
    close = 1e-5 if next(model.parameters()).dtype == torch.float64 else 1e-4
    data = [together(samples[:2]), together(samples[2:])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # T5 is no chain of blocks
        factors = stream_factors(model, data, config, CordaInit(mode="ipm"))
    hooks = build_factors(model, collect_context(model, data, names), config, CordaInit(mode="ipm"))
    for name, found in factors.factors.items():
        expected = hooks.factors[name].B @ hooks.factors[name].A
        assert (found.B @ found.A - expected).norm() <= close * expected.norm(), name
    start = run(model, batch)
    wrapped = (apply_corda if attach == "residual" else apply_anchor)(copy.deepcopy(model), factors, config).eval()
    if attach == "anchor":
        assert torch.equal(run(wrapped, batch), start)
    torch.testing.assert_close(run(wrapped, batch), start, rtol=0, atol=close)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trained = run(wrapped, batch)
    assert (trained - start).abs().max() > 1e-4
    to_lora(wrapped, factors, tmp_path / "lora")
    plain = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "lora").eval()
    torch.testing.assert_close(run(plain, batch), trained, rtol=close, atol=close)


REFUSED_BY_PEFT = {
    "bert": "its pooler gets one token of each sample",
    "roberta": "its classifier gets one token of each sample",
    "vit": "its classifier gets one token of each sample",
    "clip": "its projections get one token of each sample",
    "vilt": "its pooler gets one token of each sample",
    "routed": "an expert gets one row of a sample",
}
"""Family -> why peft's own ``preprocess_corda`` fails with all linear layers, one unpadded sample at a time."""


def test_peft_takes_no_family_that_is_not_taken_here(family, request):
    """peft's own function, at its best: names of layers in full, one sample per call, no padding."""
    from peft import get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, samples, config, names = family
    model = copy.deepcopy(model).float()
    name = request.node.callspec.params["family"].__name__
    samples = [{k: v.float() if v.is_floating_point() else v for k, v in s.items()} for s in samples]
    theirs = copy.deepcopy(config)
    theirs.target_modules, theirs.exclude_modules = set(names), None
    theirs.init_lora_weights, theirs.corda_config = "corda", CordaConfig(corda_method="ipm")
    start = run(model, alone(samples[0]))
    try:
        preprocess_corda(model, theirs, run_model=lambda: [run(model, alone(sample)) for sample in samples])
        wrapped = get_peft_model(model, theirs).eval()
        torch.testing.assert_close(run(wrapped, alone(samples[0])), start, rtol=1e-3, atol=1e-3)
        taken = True
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError, AssertionError) as error:
        taken, why = False, error
    knows_conv1d = "Conv1D" in inspect.getsource(sys.modules["peft.tuners.lora.corda"])  # an older one does not
    refused = name in REFUSED_BY_PEFT or (name == "gpt2" and not knows_conv1d)
    assert taken != refused, "taken after all" if taken else why


PAGE = Path(__file__).parents[3] / "docs/corda.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the docs are not in a source distribution of the package")
def test_the_table_in_the_docs_says_what_these_tests_find():
    """A row for each family, yes for all that is tested above, and no where peft's own function fails."""
    table = PAGE.read_text(encoding="utf-8").split("### Families")[1].split("###")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    found = {re.sub("[^a-z0-9]", "", row[0].lower()): row[1:] for row in rows[2:]}
    names = {family.__name__: {"routed": "mixtral"}.get(family.__name__, family.__name__) for family in FAMILIES}
    assert len(found) == len(names)
    for family, start in names.items():
        (row,) = (cells for label, cells in found.items() if re.match(f"{start}(?!5)", label))
        assert row[:5] == ["yes"] * 5, family
        assert row[5].startswith("no" if family in REFUSED_BY_PEFT else "yes"), family
