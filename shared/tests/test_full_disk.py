"""What cannot be written whole is one line, whichever library writes it."""

import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tenfold import UserError
from tenfold.files import replacing, reserve

resource = pytest.importorskip("resource", reason="limits of files are POSIX's")


@pytest.fixture
def small_files():
    """Files of this process end at 16 KiB, as they do where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_torch(path):
    torch.save({"weight": torch.zeros(100_000)}, path)


def write_numpy(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(100_000))


def write_safetensors(path):
    save_file({"weight": torch.zeros(100_000)}, path)


def write_text(path):
    path.write_text("0" * 100_000)


@pytest.mark.parametrize("write", [write_torch, write_numpy, write_safetensors, write_text])
@pytest.mark.usefixtures("small_files")
def test_a_file_that_does_not_fit_is_refused_and_the_old_one_stays(write, tmp_path):
    path = tmp_path / "weights.pt"
    path.write_text("old")
    with pytest.raises(UserError, match=f"^cannot write {path}: "), replacing(path) as temporary:
        write(temporary)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="posix_fallocate")
def test_a_map_has_its_space_before_it_is_written_to(tmp_path):
    """Writing to the map of a file of holes on a full disk would end the process."""
    path = tmp_path / "map.npy"
    array = np.lib.format.open_memmap(path, "w+", np.float32, (100_000,))
    assert path.stat().st_blocks * 512 < 100_000
    reserve(path)
    assert path.stat().st_blocks * 512 >= array.nbytes


def test_other_faults_pass_through(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), replacing(tmp_path / "x"):
        raise RuntimeError("something else")
