"""The list of networks that people train."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("localrecon_networks", Path(__file__).parent / "networks.py")
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

FEW = ["torchvision ConvNeXt, stochastic depth", "transformers Llama"]
REFUSED = {"timm crossvit_tiny_240": "one block"}
"""Name -> words of the line that refuses it."""


def test_there_are_sixty_and_nine_tenths_of_them_train():
    assert len(networks.NETWORKS) == 60
    assert len(REFUSED) <= 6


@pytest.mark.parametrize("name", FEW)
def test_a_network_trains_by_all_methods_and_gives_its_own_outputs(name):
    assert networks.outcome(name)[1] == "all methods"


@pytest.mark.slow
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_each_of_sixty_networks_trains_by_all_methods_or_is_refused_in_one_line(name):
    blocks, found = networks.outcome(name)
    if name in REFUSED:
        assert blocks < 2
        assert "\n" not in found
        assert REFUSED[name] in found
    else:
        assert (blocks > 1, found) == (True, "all methods")
