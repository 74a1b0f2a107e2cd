"""Foreign checkpoints: read as far as they are weights, refused in one line where they are more."""

import os
import pickle

import numpy as np
import pytest
import torch
from head_kd.checkpoints import read_weights
from head_kd.cli import main
from mmengine.logging import HistoryBuffer
from tiny_detectors import train_words

from tenfold import UserError
from tenfold.testing import assert_user_error


def test_a_pickle_is_not_run(tmp_path, capsys, project):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": Evil()}, tmp_path / "evil.pth", pickle_module=pickle)
    words = train_words(project, tmp_path / "o", "--teacher_weights", str(tmp_path / "evil.pth"))
    assert_user_error(main, words, capsys, "evil.pth", "cannot be read without running what is in it")
    assert not (tmp_path / "ran").exists()


def test_checkpoints_of_mmengine_are_read_over_their_log_buffers(tmp_path):
    buffer = HistoryBuffer()
    buffer.update(1.5)
    content = {
        "state_dict": {"module.w": torch.ones(2)},
        "message_hub": {"log": {"loss": buffer}, "n": np.float64(3)},
        "meta": {"dataset_meta": {"CLASSES": ("a", "b")}},
    }
    torch.save(content, tmp_path / "zoo.pth")
    weights = read_weights(tmp_path / "zoo.pth")
    assert list(weights.state_dict) == ["w"]
    assert weights.classes == ("a", "b")


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"bad.pth") as caught:
        read_weights(tmp_path / "bad.pth")
    assert "\n" not in str(caught.value)
