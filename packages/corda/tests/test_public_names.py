"""What `import corda` offers, also where an extra is not installed."""

import importlib
import pydoc
import sys

import corda
import pytest

from tenfold.errors import MissingExtraError


@pytest.fixture
def without_lightning(monkeypatch):
    """The package as it is imported where Lightning is not installed."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lightning", None)
        patch.delitem(sys.modules, "corda.lightning_callback", raising=False)
        vars(corda).pop("CordaCallback", None)
        yield importlib.reload(corda)
    importlib.reload(corda)


def test_all_names_and_help_work_without_lightning(without_lightning):
    assert "CordaCallback" not in without_lightning.__all__
    assert "CordaTrainerCallback" in without_lightning.__all__
    names = {}
    exec("from corda import *", names)
    assert set(without_lightning.__all__) - {"__version__"} <= set(names)
    assert "CordaTrainerCallback" in pydoc.render_doc(without_lightning)


def test_the_missing_name_says_what_to_install(without_lightning):
    with pytest.raises(MissingExtraError, match=r'lightning is not installed; pip install "corda\[lightning\]"'):
        without_lightning.CordaCallback  # noqa: B018


def test_with_lightning_the_callback_is_among_the_names():
    assert "CordaCallback" in corda.__all__
    assert corda.CordaCallback.__name__ == "CordaCallback"
