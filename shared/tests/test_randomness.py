import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenfold.randomness import generator, generator_on, key, keyed, seed_all


def draws():
    return random.random(), float(np.random.random()), float(torch.rand(()))


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_keys_are_those_of_earlier_versions():
    """Every trained result depends on them, so they are pinned."""
    assert key() == 2847183694713211083
    assert key(0) == 2631537505891389924
    assert key(1, 2, 3) == 2904650318439132554
    assert key(-1, 2**70) == 3316103705821386091


@given(st.lists(st.integers(-(2**70), 2**70), max_size=4), st.lists(st.integers(-(2**70), 2**70), max_size=4))
def test_different_keys_give_different_seeds_of_63_bits(first, second):
    assert 0 <= key(*first) < 2**63
    assert (key(*first) == key(*second)) == (first == second)


def test_keyed_covers_the_three_generators_and_restores_them():
    with keyed(1, 2, 3):
        first = draws()
    before = states()
    with keyed(1, 2, 3):
        assert draws() == first
    with keyed(1, 23):
        assert not set(draws()) & set(first)
    assert states() == before
    with pytest.raises(KeyError), keyed(1):
        draws()
        raise KeyError
    assert states() == before


def test_keyed_draws_what_seeding_each_library_by_hand_draws():
    seed = key(7, 1)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    expected = draws()
    with keyed(7, 1):
        assert draws() == expected
    with keyed(7, 1, device="cpu"):
        assert draws() == expected
    seed_all(seed)
    assert draws() == expected


def test_a_generator_draws_what_its_key_says_and_leaves_the_global_one():
    before = states()
    first = torch.rand(5, generator=generator(3, 4))
    assert torch.equal(first, torch.rand(5, generator=generator(3, 4)))
    assert torch.equal(first, torch.rand(5, generator=torch.Generator().manual_seed(key(3, 4))))
    assert torch.equal(first, torch.rand(5, generator=generator_on("cpu", 3, 4)))
    assert not torch.equal(first, torch.rand(5, generator=generator(4, 3)))
    assert states() == before


def test_keys_do_not_depend_on_the_process():
    """Python's own hash of a tuple of numbers does not either, but it takes -1 and -2 for the same."""
    program = "from tenfold.randomness import key; print(key(5, -1), key(5, -2))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert out == [str(key(5, -1)), str(key(5, -2))]
    assert out[0] != out[1]


@pytest.mark.gpu
def test_keyed_covers_the_generator_of_the_gpu_and_restores_it():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    torch.manual_seed(0)
    before = torch.cuda.get_rng_state(device).tolist()
    with keyed(1, 2, device=device):
        first = torch.rand(4, device=device)
    with keyed(1, 2, device=device):
        assert torch.equal(first, torch.rand(4, device=device))
    torch.manual_seed(key(1, 2))
    assert torch.equal(first, torch.rand(4, device=device))
    torch.manual_seed(0)
    assert torch.cuda.get_rng_state(device).tolist() == before
    with keyed(1, 2, device=device):
        torch.rand(4, device=device)
    assert torch.cuda.get_rng_state(device).tolist() == before
    on_device = torch.rand(4, device=device, generator=generator_on(device, 1, 2))
    assert torch.equal(on_device, torch.rand(4, device=device, generator=generator_on(device, 1, 2)))
