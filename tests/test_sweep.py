"""What `nox -s sweep` tries is written for every verb, with options that there are; and the sweep can fail."""

import sys
import types
from pathlib import Path

import pytest
import yaml
from distributions import PACKAGES
from sweep import Sweep, flat, unlike

from tenfold.config import leaves

OWN = {"--quiet", "--resume", "--overwrite", "--debug", "--strict", "--config", "--quick"}


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_every_verb_has_a_step_with_known_options(package):
    steps = yaml.safe_load((package.folder / "tests/sweep.yaml").read_text(encoding="utf-8"))
    verbs = {verb.name: verb for verb in package.app.verbs}
    assert verbs.keys() == {step["verb"] for step in steps}
    for step in steps:
        known = OWN | {f"--{name}" for name, _ in leaves(verbs[step["verb"]].settings)}
        options = {word for word in flat(step["words"]) if str(word).startswith("--")}
        assert options <= known, step
        assert set(step.get("files", [])) <= options, step


def refuses(words):
    """As promised."""
    sys.stderr.write("toy: error: --data: no such file\n")
    return 2


def leaves_a_folder(words):
    Path(words[words.index("--out") + 1]).mkdir(parents=True)
    return refuses(words)


def leaves_what_it_keeps(words):
    Path(words[words.index("--out") + 1] + "-kept").mkdir(parents=True)
    return refuses(words)


def says_two_lines(words):
    sys.stderr.write("toy: error: first\n")
    return refuses(words)


def says_more_afterwards(words):
    code = refuses(words)
    sys.stderr.write("in file x, line 3\n")
    return code


def is_done(words):
    return 0


def falls(words):
    raise KeyError("size")


@pytest.mark.parametrize(
    ("main", "found"),
    [
        (refuses, "refused"),
        (leaves_a_folder, "FAULT: out is left behind"),
        (leaves_what_it_keeps, "FAULT: out-kept is left behind"),
        (says_two_lines, "FAULT: exit code 2, toy: error: --data: no such file"),
        (says_more_afterwards, "FAULT: exit code 2, in file x, line 3"),
        (is_done, "FAULT: exit code 0, nothing printed"),
        (falls, "FAULT: exit code 1, KeyError: 'size'"),
    ],
)
def test_a_refusal_that_is_not_as_promised_is_a_fault(main, found, tmp_path):
    sweep = Sweep(types.SimpleNamespace(name="toy", main=main), tmp_path, tmp_path / "log")
    assert sweep.refused(["train", "--out", str(tmp_path / "out")]) == found
    assert ("toy train --out" in (tmp_path / "log").read_text()) == (found != "refused")


def test_a_run_that_was_resumed_has_every_file_alike(tmp_path):
    for name in ("one", "other"):
        for file in ("metrics.csv", "sub/weights.safetensors"):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("1,2,3")
    assert unlike(tmp_path / "one", tmp_path / "other") == []
    (tmp_path / "other/metrics.csv").write_text("1,2,4")
    (tmp_path / "other/sub/weights.safetensors").unlink()
    assert unlike(tmp_path / "one", tmp_path / "other") == ["metrics.csv", "sub/weights.safetensors"]
