"""The examples in the docstrings of public names, which the site shows, are run; the names that need one have one."""

import doctest
import importlib
import inspect

import pytest
import torch
from distributions import PACKAGES

LOSSES = ("_loss", "_per_sample", "_weights", "_contrast", "factorize", "selective_scan")


def needs_an_example(name: str, value: object) -> bool:
    """A loss, a module or an estimator."""
    if inspect.isclass(value):
        return issubclass(value, torch.nn.Module) or {"fit", "predict"} <= set(dir(value))
    return inspect.isfunction(value) and name.endswith(LOSSES)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_examples_say_what_happens(package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [name for name in package.module.__all__ if name != "__version__"]
    found = {}
    for name in names:
        value = getattr(package.module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        examples = doctest.DocTestParser().get_examples(value.__doc__ or "")
        assert examples or not needs_an_example(name, value), f"{name} has no example"
        if examples:
            found[name] = (value, examples)
    assert found
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    printed: list[str] = []
    for name, (value, examples) in found.items():
        torch.manual_seed(0)
        # what is in reach where the name is defined, and the package's public names
        public = {each: getattr(package.module, each) for each in names}
        names_there = {**public, **vars(importlib.import_module(value.__module__)), "torch": torch}
        runner.run(doctest.DocTest(examples, names_there, name, None, 0, value.__doc__), out=printed.append)
    assert not printed, "".join(printed)
