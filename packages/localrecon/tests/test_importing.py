"""What the package needs of others."""

import subprocess
import sys
import textwrap

import localrecon


def in_a_fresh_process(script):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)


def test_without_lightning_all_but_its_glue_is_there_and_nothing_imports_it():
    done = in_a_fresh_process(
        """
        import importlib.abc, sys

        from localrecon import LocalTrainer
        assert "lightning" not in sys.modules, "the plain trainer imports it where it is installed"
        for name in [name for name in sys.modules if name.partition(".")[0] == "localrecon"]:
            del sys.modules[name]

        class Hidden(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "lightning":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Hidden())
        from localrecon import *
        assert LocalTrainer.__module__ == "localrecon.trainer"
        assert "LocalReconModule" not in globals()
        import localrecon
        try:
            localrecon.LocalReconModule
        except ImportError as error:
            print(error)
        help(localrecon)
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('LocalReconModule needs Lightning: pip install "tenfold[lightning]"')


def test_the_public_names_are_few():
    assert len(localrecon.__all__) <= 22
