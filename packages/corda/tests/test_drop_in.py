"""``preprocess_corda`` in place of peft's: what peft's own tests of it ask for, asked of ours; only the import differs."""

import copy

import pytest
import torch
from corda import preprocess_corda
from corda.config import CordaInit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import nn

SIZE = 96
FIELDS = ("sample_count", "covariance_matrix", "corda_method", "rank")
METHODS = pytest.mark.parametrize("method", ["ipm", "kpm"])


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(SIZE, SIZE)

    def forward(self, x):
        return self.linear(x)


@pytest.fixture
def model():
    return Single().eval()


@pytest.fixture
def data():
    return torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(233))


def configuration(method, corda=None, **options):
    settings = CordaConfig(corda_method=method, **(corda or {}))
    return LoraConfig(init_lora_weights="corda", target_modules=["linear"], corda_config=settings, **options)


@METHODS
def test_no_temporary_field_stays(model, data, method):
    config = configuration(method)
    preprocess_corda(model, config, run_model=lambda: model(data), hooked_model=model)
    assert not any(hasattr(model.linear, field) for field in FIELDS)
    wrapped = get_peft_model(model, config)
    assert not any(hasattr(wrapped.base_model.linear, field) for field in (*FIELDS, "eigens", "mean", "std"))


@METHODS
def test_fields_stay_when_they_are_not_to_be_pruned(model, data, method, tmp_path):
    """Two runs of the same data: their mean is C, and they are two samples; the input's largest entry is nearly 1."""
    config = configuration(method, {"prune_temporary_fields": False}, r=4)
    preprocess_corda(model, config, run_model=lambda: [model(data), model(data)], hooked_model=model)
    scaled = data / data.max()
    torch.testing.assert_close(model.linear.covariance_matrix, scaled.T @ scaled)
    assert model.linear.covariance_matrix.dtype == torch.float32
    assert (model.linear.sample_count, model.linear.corda_method, model.linear.rank) == (2, method, 4)


@METHODS
def test_the_users_hook_stays_and_ours_goes(model, data, method):
    calls = []
    model.linear.register_forward_hook(lambda *args: calls.append(1))
    config = configuration(method, {"prune_temporary_fields": False})
    preprocess_corda(model, config, run_model=lambda: model(data), hooked_model=model)
    assert len(calls) == model.linear.sample_count == 1
    model(data)
    assert len(calls) == 2
    assert model.linear.sample_count == 1


@METHODS
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"linear": 8, "embed": 16}}])
def test_it_starts_at_the_model_and_either_file_gives_the_same_adapter(model, data, tmp_path, method, hooked, options):
    files = {"cache_file": tmp_path / "cache.pt", "covariance_file": tmp_path / "covariance.pt"}
    before = model(data)
    ran = copy.deepcopy(model) if hooked else model
    outputs = []
    for given in (files, {"cache_file": files["cache_file"]}, {"covariance_file": files["covariance_file"]}):
        fresh = copy.deepcopy(model)
        config = configuration(method, given, **options)
        if outputs:
            preprocess_corda(fresh, config)
        else:
            runner = ran if hooked else fresh
            preprocess_corda(
                fresh, config, run_model=lambda runner=runner: runner(data), hooked_model=ran if hooked else None
            )
        wrapped = get_peft_model(fresh, config)
        torch.testing.assert_close(wrapped(data), before, rtol=1e-5, atol=2e-6)
        wrapped.base_model.linear.lora_B["default"].weight.data *= 2
        outputs.append(wrapped(data))
    assert (outputs[0] - before).abs().max() > 1e-4
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-5, atol=2e-6)


@METHODS
@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"r": 8}, 8),
        ({"r": 8, "rank_pattern": {"linear": 16}}, 16),
        ({"r": 8, "lora_alpha": 5, "alpha_pattern": {"linear": 3}}, 8),
        ({"r": 8, "use_rslora": True}, 8),
    ],
)
def test_pefts_own_saving_and_conversion_give_the_trained_model(model, data, tmp_path, method, options, rank):
    config = configuration(method, **options)
    preprocess_corda(model, config, run_model=lambda: model(data), hooked_model=model)
    wrapped = get_peft_model(copy.deepcopy(model), config)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "initial")
    wrapped.peft_config["default"].init_lora_weights = "corda"
    wrapped.base_model.linear.lora_B["default"].weight.data *= 2
    trained = wrapped(data)
    wrapped.save_pretrained(tmp_path / "trained")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "trained")
    torch.testing.assert_close(loaded(data), trained, rtol=1e-5, atol=2e-6)
    assert loaded.base_model.model.linear.lora_A["default"].weight.shape[0] == rank
    assert not torch.allclose(
        model.linear.weight, loaded.base_model.model.linear.base_layer.weight, atol=1e-6, rtol=1e-6
    )
    before = wrapped.peft_config["default"].to_dict()
    wrapped.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial")
    assert wrapped.peft_config["default"].to_dict() == before
    converted = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "converted")
    torch.testing.assert_close(converted(data), trained, rtol=1e-5, atol=2e-6)
    assert converted.base_model.model.linear.lora_A["default"].weight.shape[0] == 2 * rank
    assert torch.equal(model.linear.weight, converted.base_model.model.linear.base_layer.weight)


@METHODS
def test_rslora_with_patterns_is_refused_by_pefts_conversion(model, data, tmp_path, method):
    """peft cannot; ``to_lora`` can."""
    config = configuration(method, r=8, rank_pattern={"linear": 4}, use_rslora=True)
    preprocess_corda(model, config, run_model=lambda: model(data), hooked_model=model)
    wrapped = get_peft_model(copy.deepcopy(model), config)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="rslora"):
        wrapped.save_pretrained(tmp_path / "b", path_initial_model_for_weight_conversion=tmp_path / "initial")


def test_settings_of_peft_become_ours():
    assert CordaInit.from_peft(CordaConfig(corda_method="kpm")) == CordaInit(mode="kpm")
    assert CordaInit.from_peft(CordaConfig(corda_method="ipm"), balance="balanced") == CordaInit(
        mode="ipm", balance="balanced"
    )
