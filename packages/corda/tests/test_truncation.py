import pytest
import torch
from corda import collect_context, truncate_model
from corda.truncation import truncate

from tenfold import UserError

METHODS = [{"method": "svd"}, {"method": "asvd"}, {"method": "cosvd"}, {"method": "cosvd", "power": 0.5}]


@pytest.fixture
def problem():
    torch.manual_seed(0)
    X = torch.randn(20, 80, dtype=torch.float64) * torch.logspace(1, -1, 20, dtype=torch.float64)[:, None]
    return torch.randn(12, 20, dtype=torch.float64), X @ X.T, X


@pytest.mark.parametrize("options", METHODS)
def test_nothing_dropped_is_the_weight_itself_and_everything_is_zero(problem, options):
    """Bit-identical at 0."""
    W, C, _ = problem
    assert truncate(W, C, 0, **options) is W
    assert truncate(W, C, 12, **options).abs().max() == 0
    assert torch.linalg.matrix_rank(truncate(W, C, 5, **options)) == 7


def test_weighted_error_grows_with_what_is_dropped_and_is_the_least(problem):
    """The error is the root of the dropped sigma squared."""
    W, C, _ = problem
    Cd = C + 0.01 * C.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    S = torch.linalg.svdvals(W @ Cd)
    errors = [((W - truncate(W, C, q)) @ Cd).norm().item() for q in range(13)]
    assert errors == sorted(errors)
    assert errors == pytest.approx([S[12 - q :].square().sum().sqrt().item() for q in range(13)], abs=1e-8)


def test_power_one_half_gives_the_least_error_of_the_outputs(problem):
    W, C, X = problem
    errors = {str(options): ((W - truncate(W, C, 6, **options)) @ X).norm().item() for options in METHODS}
    assert min(errors, key=errors.get) == str({"method": "cosvd", "power": 0.5})


def test_asvd_equals_its_definition(problem):
    W, C, X = problem
    S = torch.diag((X.square().sum(dim=1)).sqrt() ** 0.5)
    U, sigma, Vh = torch.linalg.svd(W @ S, full_matrices=False)
    expected = U[:, :7] @ torch.diag(sigma[:7]) @ Vh[:7] @ torch.linalg.inv(S)
    torch.testing.assert_close(truncate(W, C, 5, method="asvd"), expected)


def test_a_model_is_truncated_in_place_by_shares(llama, batches):
    stats = collect_context(llama.double(), batches)
    before = llama.lm_head.weight.clone()
    truncate_model(llama, stats, 0.5)
    assert torch.linalg.matrix_rank(llama.model.layers[0].mlp.down_proj.weight) == 16
    assert torch.linalg.matrix_rank(llama.model.layers[0].self_attn.k_proj.weight) == 8
    assert torch.equal(llama.lm_head.weight, before)


def test_a_model_is_truncated_in_place_by_numbers_of_components(llama, batches):
    """As in the paper's Figure 2; zero of them leaves every bit."""
    stats = collect_context(llama.double(), batches)
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    for nothing in (0, 0.0):
        truncate_model(llama, stats, nothing)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    truncate_model(llama, stats, 1)
    assert torch.linalg.matrix_rank(llama.model.layers[0].mlp.down_proj.weight) == 31
    assert torch.linalg.matrix_rank(llama.model.layers[0].self_attn.k_proj.weight) == 15


def test_bad_arguments(problem, llama, batches):
    W, C, _ = problem
    with pytest.raises(UserError, match="13 components cannot be dropped from a layer that has 12"):
        truncate(W, C, 13)
    with pytest.raises(UserError, match="needs a covariance"):
        truncate(W, None, 3)
    with pytest.raises(UserError, match="unknown method 'cosvdd': did you mean cosvd"):
        truncate(W, C, 3, method="cosvdd")
    with pytest.raises(UserError, match="power must be 0, 0.5 or 1, got 0.7"):
        truncate(W, C, 3, power=0.7)
    some = collect_context(llama, batches, ["model.layers.0.mlp.up_proj"])
    start = llama.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(UserError, match="no statistics of layer model.layers.1.mlp.up_proj"):
        truncate_model(llama, some, 0.5, targets=["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"])
    assert torch.equal(llama.model.layers[0].mlp.up_proj.weight, start), "no layer changes when one cannot"
    with pytest.raises(UserError, match="share of the components, from 0 to 1, or their number"):
        truncate_model(llama, None, 1.5, targets=["lm_head"], method="svd")
    whole = llama.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(UserError, match=r"layer model\.layers\.0\.self_attn\.k_proj: 17 components cannot be dropped"):
        truncate_model(
            llama, None, 17, targets=["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj"], method="svd"
        )
    assert torch.equal(llama.model.layers[0].mlp.up_proj.weight, whole), "no layer changes when one cannot"
    stats = collect_context(llama, batches)
    truncate_model(llama, stats, 0.5)
    with pytest.raises(UserError, match="another model"):
        truncate_model(llama, stats, 0.5)
