from pathlib import Path

import head_kd
import pytest
import torch
import yaml
from head_kd.cli import main
from head_kd.compose import pair
from head_kd.config import WITH_TEACHER, Distillation
from head_kd.configs import resolve_config
from head_kd.stack import build

RECIPES = sorted((Path(head_kd.__file__).parent / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """Weights for each teacher config that recipes name, made once."""
    made = {}

    def of(config):
        if config not in made:
            made[config] = str(tmp_path_factory.mktemp("zoo") / "teacher.pth")
            torch.save({"state_dict": build(resolve_config(config).model).state_dict()}, made[config])
        return made[config]

    return of


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_builds_its_pair(recipe, random_weights, capsys):
    """The models of a recipe are built whole, with a teacher of random weights in place of the zoo's."""
    assert main(["train", "--config", f"recipe:{recipe.stem}", "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    distill = Distillation(**settings["distill"])
    teacher = settings["teacher"]
    weights = random_weights(teacher) if settings["method"] in WITH_TEACHER else None
    model = build(pair(resolve_config(settings["student"]), teacher, weights, settings["method"], distill).model)
    assert len(model.assistants) >= 1
    if weights is not None:
        model.transfer()
        assert model.untransferred == {"assistant0": []}
