import pytest
import torch
from torch import nn

from tenfold.modules import evaluating


def test_each_submodule_has_its_own_mode_again():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model[1].eval()  # a frozen batch norm
    other = nn.Dropout()
    with evaluating(model, other):
        assert not any(module.training for module in (*model.modules(), *other.modules()))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert other.training
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_gradients_are_recorded_only_where_asked_for():
    model = nn.Linear(2, 1)
    with evaluating(model):
        assert not model(torch.ones(1, 2)).requires_grad
    with evaluating(model, gradients=True):
        assert model(torch.ones(1, 2)).requires_grad
    assert torch.is_grad_enabled()
