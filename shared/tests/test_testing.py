import sys

import pytest
import torch

from tenfold.testing import assert_gradient_isolated, assert_same_as_reference, assert_user_error


def test_same_as_reference_fails_on_shape_error_and_nan():
    a = torch.ones(3)
    assert_same_as_reference(a + 1e-6, a, relative=1e-5)
    with pytest.raises(AssertionError, match="relative error 0.1"):
        assert_same_as_reference(a * 1.1, a, relative=1e-5)
    with pytest.raises(AssertionError, match="shape"):
        assert_same_as_reference(a, a[None], relative=1)
    with pytest.raises(AssertionError, match="NaN"):
        assert_same_as_reference(a * float("nan"), a, relative=1)


def test_gradient_isolation_sees_a_leak_and_a_missing_path():
    student, teacher = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert_gradient_isolated((student * teacher.detach()).sum(), reaches=[student], spares=[teacher])
    with pytest.raises(AssertionError, match="leaks"):
        assert_gradient_isolated((student * teacher).sum(), reaches=[student], spares=[teacher])
    with pytest.raises(AssertionError, match="no gradient path"):
        assert_gradient_isolated(teacher.sum(), reaches=[student], spares=[])


@pytest.mark.parametrize(
    ("code", "err", "fault"),
    [
        (0, "x: error: rank\n", "exit code"),
        (2, "x: error: a\nb\n", "2 lines"),
        (2, "x: error: other\n", "'rank' is not in"),
    ],
)
def test_user_error_demands_code_two_one_line_and_the_words(capsys, code, err, fault):
    def main(argv):
        sys.stderr.write(err)
        return code

    with pytest.raises(AssertionError, match=fault):
        assert_user_error(main, [], capsys, "rank")
