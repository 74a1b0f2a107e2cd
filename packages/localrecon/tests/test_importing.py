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


def test_the_plain_trainer_does_not_import_lightning_where_it_is_installed():
    done = in_a_fresh_process("from localrecon import LocalTrainer; import sys; assert 'lightning' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_the_public_names_are_few():
    assert len(localrecon.__all__) <= 22
