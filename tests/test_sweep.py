"""What `nox -s sweep` tries is written for every verb, with options that there are."""

import pytest
import yaml
from distributions import PACKAGES
from sweep import flat

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
