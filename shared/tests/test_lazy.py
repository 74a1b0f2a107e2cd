import subprocess
import sys
import textwrap

import pytest

INIT = """
from typing import TYPE_CHECKING
from tenfold.lazy import attach

__version__ = "1.0"
if TYPE_CHECKING:
    from example.method import Loss as Loss
    from example.method import hidden
    from example.trainer import Trainer as Trainer
__all__, __getattr__, __dir__ = attach(__name__, needs={"trainer": "no_such_library"})
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script beside a package ``example`` with a method, and a trainer whose library is missing."""
    (tmp_path / "example").mkdir()
    (tmp_path / "example/__init__.py").write_text(INIT)
    (tmp_path / "example/method.py").write_text("class Loss:\n    pass\nhidden = 1\n")
    (tmp_path / "example/trainer.py").write_text(
        "from tenfold.errors import needs\nneeds('no_such_library', 'trainer')\nclass Trainer: ...\n"
    )

    def run(script):
        code = textwrap.dedent(script)
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_names_load_on_first_use_and_are_those_of_the_block(run):
    out = run(
        """
        import sys, example
        print("example.method" in sys.modules, example.__all__, dir(example))
        print(example.Loss is example.Loss, "example.method" in sys.modules)
        for name in ("hidden", "nothing"):
            try:
                getattr(example, name)
            except AttributeError as error:
                print(error)
        """
    )
    assert out.splitlines() == [
        "False ['Loss', '__version__'] ['Loss', '__version__']",
        "True True",
        "module 'example' has no attribute 'hidden'",
        "module 'example' has no attribute 'nothing'",
    ]


def test_star_import_and_help_work_where_an_extra_is_missing_and_its_name_says_what_is(run):
    out = run(
        """
        from example import *
        import example, pydoc
        print(Loss.__name__, "Trainer" in globals(), "class Loss" in pydoc.plain(pydoc.render_doc(example)))
        try:
            example.Trainer
        except ImportError as error:
            print(error)
        """
    )
    assert out.splitlines() == [
        "Loss False True",
        'no_such_library is not installed; pip install "tenfold[trainer]"',
    ]
