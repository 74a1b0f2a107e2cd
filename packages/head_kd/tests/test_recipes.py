from pathlib import Path

import head_kd
import pytest
from head_kd import training
from head_kd.checkpoints import resolve_config
from head_kd.cli import main
from head_kd.compose import pair
from head_kd.config import Distillation

RECIPES = sorted((Path(head_kd.__file__).parent / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_builds_its_pair(recipe, tmp_path, capsys):
    """The models of a recipe are built whole, with a teacher of random weights in place of the zoo's."""
    import yaml
    from mmdet.registry import MODELS

    assert main(["train", "--config", f"recipe:{recipe.stem}", "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    distill = Distillation(**settings["distill"])
    teacher = settings["teacher"]
    checkpoint = training.random_teacher(teacher, tmp_path) if distill.needs_teacher else None
    model = MODELS.build(pair(resolve_config(settings["student"]), teacher, checkpoint, distill).model)
    assert len(model.assistants) >= 1
    training.strip_pretrained(model)
    if distill.needs_teacher:
        model.transfer()
        assert model.untransferred == {"assistant0": []}
