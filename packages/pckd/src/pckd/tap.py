"""Features and category centers of a model that is not edited: a hook on the input of its last linear layer."""

from typing import Any

import torch
from torch import Tensor, nn

from pckd.losses import Outputs
from tenfold import UserError
from tenfold.errors import did_you_mean

_NAMES = ("fc", "classifier", "linear", "head", "heads")
_STAGES = ("layer2", "block2", "stages.1")
"""Names of a second stage: ResNets of all libraries and WRNs, timm's stages."""


class ClassifierNotFound(UserError):
    """The model's last linear layer could not be found; the message lists its linear layers."""


class ClassifierTap(nn.Module):
    """Run a classifier and give logits, the feature that its last linear layer saw, and that layer's weights.

    The layer is the one at ``path``; or what timm's ``get_classifier()`` names; or the last linear layer of a child named fc,
    classifier, linear, head or heads. Dropout before the layer makes the feature stochastic in training, as it does the logits.

    Args:
        model: any classifier.
        path: of the layer, as in ``named_modules``.
        hint: path of the module whose output is the intermediate map for FitNet.

    Raises:
        ClassifierNotFound: no such layer, or several heads; the message lists the candidates.
    """

    def __init__(self, model: nn.Module, path: str | None = None, hint: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.path = find_classifier(model, path)
        self.hint = hint
        self._seen: dict[str, Tensor] = {}
        self.classifier.register_forward_pre_hook(self._keep_feature)
        if hint is not None:
            modules = dict(model.named_modules())
            if hint not in modules:
                raise UserError(f"the model has no module '{hint}': {did_you_mean(hint, modules)}")
            modules[hint].register_forward_hook(self._keep_hint)

    def _keep_feature(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._seen["feature"] = inputs[0]

    def _keep_hint(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._seen["hint"] = output

    @property
    def classifier(self) -> nn.Linear:
        """The last linear layer."""
        layer = self.model.get_submodule(self.path)
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def feature_dim(self) -> int:
        """Width of the feature."""
        return self.classifier.in_features

    @property
    def num_classes(self) -> int:
        """Rows of the last linear layer."""
        return self.classifier.out_features

    def forward(self, images: Tensor) -> Outputs:
        """Images (N, 3, H, W) -> ``Outputs``.

        Raises:
            ValueError: the feature is not (N, D).
        """
        self._seen.clear()
        logits = self.model(images)
        feature = self._seen.get("feature")
        if feature is None:
            raise ClassifierNotFound(f"the layer '{self.path}' was not used: {_candidates(self.model)}")
        if feature.ndim != 2:
            raise ValueError(f"the input of '{self.path}' must be (N, D), got {tuple(feature.shape)}")
        layer = self.classifier
        out = Outputs(logits, feature, layer.weight, layer.bias, self._seen.get("hint"))
        self._seen.clear()
        return out

    @torch.no_grad()
    def check(self, images: Tensor) -> Outputs:
        """Run once in evaluation mode and make sure that feature W^T + b is the logits.

        Raises:
            ClassifierNotFound: it is not (a second head, a scale on the cosine): give another path.
        """
        training = self.model.training
        self.model.eval()
        out = self(images)
        self.model.train(training)
        expected = nn.functional.linear(out.feature, out.weight, out.bias)
        same = out.logits.shape == expected.shape
        if not same or not torch.allclose(out.logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
            raise ClassifierNotFound(
                f"the logits are not those of the layer '{self.path}' alone; name another: {_candidates(self.model)}"
            )
        return out


def find_classifier(model: nn.Module, path: str | None = None) -> str:
    """Path of the last linear layer; see ``ClassifierTap``."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if path is not None:
        if path not in linear:
            raise ClassifierNotFound(f"'{path}' is no linear layer: {_candidates(model, path)}")
        return path
    getter: Any = getattr(model, "get_classifier", None)  # timm
    named = None if getter is None else getter()
    if isinstance(named, nn.Linear):
        return next(name for name, module in linear.items() if module is named)
    if named is None:
        for name in _NAMES:
            if isinstance(getattr(model, name, None), nn.Module):
                inside = [key for key in linear if key == name or key.startswith(f"{name}.")]
                if inside:
                    return inside[-1]
    raise ClassifierNotFound(
        f"{type(model).__name__} has no last linear layer under a usual name: {_candidates(model)}"
    )


def _candidates(model: nn.Module, path: str = "") -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name]
    return f"linear layers are {', '.join(names)}" if names else "it has no linear layer inside"


def second_stage(model: nn.Module, images: Tensor) -> str:
    """Path of the module that FitNet takes its map from: layer2, block2, stages.1, or the last one at the second resolution.

    Raises:
        UserError: the model gives maps of one resolution only.
    """
    modules = dict(model.named_modules())
    for name in _STAGES:
        if name in modules:
            return name
    sides: dict[int, str] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] > 1:
                sides[output.shape[-1]] = name

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items() if name]
    training = model.training
    with torch.no_grad():
        model.eval()
        model(images)
    model.train(training)
    for handle in handles:
        handle.remove()
    found = sorted(sides, reverse=True)
    if len(found) < 2:
        raise UserError(
            f"{type(model).__name__} has no second stage: name the module by --losses.fitnet.student or .teacher"
        )
    return sides[found[1]]
