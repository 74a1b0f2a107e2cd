"""Every setting of `visctrl`, and the one home of each default. Imports no torch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tenfold.config
from tenfold import UserError
from tenfold.config import (
    Count,
    Device,
    Distinct,
    Ge,
    Interval,
    Length,
    Natural,
    NonNegative,
    Positive,
    Probability,
    SettingError,
    Settings,
    Share,
    parse_bytes,
)

Mode = Literal["replace", "union", "subject"]
BankKind = Literal["auto", "memory", "pinned", "stream"]
Preset = Literal["none", "paper", "masactrl", "fast"]


@dataclass(frozen=True, kw_only=True)
class VisCtrlConfig(Settings):
    """How a reference enters a target.

    Args:
        steps: denoising steps of a round.
        start: share of the steps that pass before injection begins; later keeps more of the target's structure.
        layers: self-attention layers, in the order of execution: 1: (from 1 on), 44:64, 0,3,-1, up, a module's name.
        rounds: how often the edited picture becomes the next target.
        guidance: guidance scale of the sampling (default: 4 where the model takes prompts, else 1, which is none).
        inversion_guidance: guidance scale of the inversion (null: that of the sampling, as the released code does).
        guidance_rows: reference branch that the target's branches read: cond for both, or each its own (match).
        refine: network evaluations per level of the inversion; 1 is plain inversion.
        mode: what a target attends to: replace (the reference), union (both), subject (own background, their subject).
        strength: share of the injected attention output.
        bias: added to the logits of the reference's keys, in modes union and subject.
        partial: invert the target only to the level at which injection begins; exact where both guidances agree.
        later_steps: steps of the rounds after the first (default: as the first).
        later_start: start of the rounds after the first (default: as the first).
        later_guidance: guidance of the rounds after the first (default: as the first).
        bank: where the reference's features are kept: memory, pinned (CPU), stream (not at all: its rows ride in the
            batch), or auto (memory up to max_bank, else stream).
        max_bank: largest size of the features for bank auto, such as 4GB or 500MiB.
        lock: hold everything outside of the target's mask to the target, where there is a mask.
        guard: stop before a round that would drift, and return the round before it.
        max_residual: relative change in the last evaluation of an inversion beyond which a round is not begun.
        max_clipped: growth of the share of clipped pixels, against the target, beyond which a round is not kept.
        max_layout: growth of the distance to the target's layout, against the first round, beyond which a round is not kept.
    """

    steps: Count = 10
    start: Probability = 0.4
    layers: str = "1:"
    rounds: Count = 3
    guidance: NonNegative | None = None
    inversion_guidance: NonNegative | None = 1.0
    guidance_rows: Literal["cond", "match"] = "cond"
    refine: Count = 3
    mode: Mode = "replace"
    strength: Probability = 1.0
    bias: float = 0.0
    partial: bool = True
    later_steps: Count | None = None
    later_start: Probability | None = None
    later_guidance: NonNegative | None = None
    bank: BankKind = "auto"
    max_bank: str = "4GB"
    lock: bool = True
    guard: bool = True
    max_residual: Positive = 0.1
    max_clipped: Share = 0.05
    max_layout: Positive = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias and self.mode == "replace":
            raise SettingError("bias", "expected 0 in mode replace, where every key is the reference's")
        parse_bytes(self.max_bank, "max_bank")

    @property
    def bank_bytes(self) -> int:
        """``max_bank`` in bytes."""
        return parse_bytes(self.max_bank)

    def of_round(self, number: int) -> "VisCtrlConfig":
        """The settings of a round, counted from 0."""
        if number == 0:
            return self
        later: dict[str, Any] = {"steps": self.later_steps, "start": self.later_start, "guidance": self.later_guidance}
        return dataclasses.replace(self, **{name: value for name, value in later.items() if value is not None})

    @classmethod
    def paper(cls, rounds: int = 5, **changes: Any) -> "VisCtrlConfig":
        """The settings of the authors' released code: guided plain inversion, 10 steps, then 5; no guard."""
        own: dict[str, Any] = {
            "steps": 10,
            "start": 0.2,
            "layers": "1:",
            "rounds": rounds,
            "guidance": 6.0,
            "inversion_guidance": None,
            "guidance_rows": "match",
            "refine": 1,
            "partial": False,
            "later_steps": 5,
            "later_start": 0.2,
            "later_guidance": 4.0,
            "lock": False,
            "guard": False,
        }
        return cls(**(own | changes))

    @classmethod
    def masactrl(cls, **changes: Any) -> "VisCtrlConfig":
        """One round in the manner of MasaCtrl: 50 steps, from step 4 and layer 10 on, plain inversion."""
        own: dict[str, Any] = {
            "steps": 50,
            "start": 0.08,
            "layers": "10:",
            "rounds": 1,
            "guidance": 7.5,
            "guidance_rows": "match",
            "refine": 1,
            "partial": False,
            "lock": False,
            "guard": False,
        }
        return cls(**(own | changes))

    @classmethod
    def fast(cls, **changes: Any) -> "VisCtrlConfig":
        """Fewer steps, rounds and evaluations."""
        return cls(**({"steps": 6, "start": 0.34, "rounds": 2, "refine": 2} | changes))


def of_preset(name: Preset) -> VisCtrlConfig | None:
    """The settings that a preset stands for."""
    made = {"paper": VisCtrlConfig.paper, "masactrl": VisCtrlConfig.masactrl, "fast": VisCtrlConfig.fast}
    return made[name]() if name in made else None


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """A pretrained model, and how it is loaded.

    Args:
        model: folder of a pipeline of diffusers, a .safetensors file of Stable Diffusion, or a name on the model hub.
        model_config: folder of a pipeline whose configurations a .safetensors file is loaded with (default: those of the
            model hub).
        variant: variant of the weights, such as fp16.
        dtype: number format; auto is fp16 on a GPU and fp32 on a CPU.
        offload: keep parts of the model on the CPU while they are not needed (GPU only).
        size: longest side that pictures are brought to before they are edited (default: the model's own).
        device: where to compute; auto takes a GPU when there is one.
    """

    model: str
    model_config: str | None = None
    variant: str | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    offload: bool = False
    size: Annotated[int, Ge(8)] | None = None
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class EditSettings(ModelSettings):
    """Put the subject of a reference picture into other pictures.

    Args:
        target: pictures to edit.
        reference: picture whose subject enters.
        run: folder of a `visctrl bank`, in place of a reference.
        pairs: table in place of both: a CSV file with the columns target and reference, and if needed target_mask,
            reference_mask, target_prompt, reference_prompt; paths are relative to the file.
        target_mask: where the targets' subject is: a file (white on black), alpha (of the picture), or white (all that is
            not nearly white).
        reference_mask: the same for the reference.
        target_prompt: what the result shows.
        reference_prompt: what the reference shows.
        negative_prompt: what the result does not show.
        crop: cut the subjects out onto white squares, edit these, and paste the result back; needs both masks.
        feather: pixels over which a pasted result passes into the photograph.
        preset: settings of a published method in place of control: paper, masactrl, or fast.
        control: how the reference enters.
    """

    target: list[str] | None = None
    reference: str | None = None
    run: str | None = None
    pairs: str | None = None
    target_mask: str | None = None
    reference_mask: str | None = None
    target_prompt: str = ""
    reference_prompt: str = ""
    negative_prompt: str = ""
    crop: bool = False
    feather: NonNegative = 2.0
    preset: Preset = "none"
    control: VisCtrlConfig = field(default_factory=VisCtrlConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_what_is_edited(self)

    @property
    def chosen(self) -> VisCtrlConfig:
        """The settings of the preset, else those of control."""
        return of_preset(self.preset) or self.control


def _check_what_is_edited(s: EditSettings) -> None:
    if s.pairs is not None:
        given = [name for name in ("target", "reference", "run", "target_mask", "reference_mask") if getattr(s, name)]
        if given:
            raise UserError(f"--pairs names targets, references and masks itself: leave out --{given[0]}")
    elif not s.target:
        raise UserError("nothing to edit: give --target FILE with --reference FILE or --run DIR, or --pairs FILE.csv")
    elif (s.reference is None) == (s.run is None):
        raise UserError("give --reference FILE, or --run DIR of a `visctrl bank`, and not both")
    if s.preset != "none" and s.control != VisCtrlConfig():
        raise UserError(f"--preset {s.preset} has settings of its own: leave out --control")
    if s.crop and s.pairs is None and (s.target_mask is None or (s.reference is not None and not s.reference_mask)):
        raise UserError("--crop cuts subjects out: give --target_mask and --reference_mask")
    if s.crop and s.run is not None:
        raise UserError("--crop works on a reference picture: give --reference, not --run")
    if s.run is not None and s.reference_mask is not None:
        raise UserError("the mask of a reference belongs to its `visctrl bank`: leave out --reference_mask")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Settings):
    """How several references enter the views of one scene.

    Args:
        kind: feature (keys of two references side by side, weighed), latent (noisy latents of two references mixed), or
            single (one reference per view, drawn once: nothing ties the views together).
        alpha: weight of a view's own reference; the rest goes to one that is drawn anew in every step.
        pool: views that are edited first and then are references for the others, too.
    """

    kind: Literal["feature", "latent", "single"] = "feature"
    alpha: Annotated[float, Interval(gt=0, le=1)] = 0.5
    pool: Natural = 0


@dataclass(frozen=True, kw_only=True)
class ViewsSettings(ModelSettings):
    """Put the subject of reference pictures into all views of a scene.

    Args:
        data: the scene: nerfstudio:DIR (with transforms.json), colmap:DIR (with sparse/0 and images), or folder:DIR (of
            pictures). It is written again under scene in the output folder, in the same layout with the same cameras.
        reference: pictures whose subject enters; several may show it from several sides.
        reference_mask: where the references' subject is: a file for each, or once for all alpha (of the picture) or white.
        target_mask: where the views' subject is: scene (white in the scene's own masks), a folder of masks with the views'
            names, alpha, or white.
        target_prompt: what the views then show.
        reference_prompt: what the references show.
        negative_prompt: what the views do not show.
        missing: what to do where the scene names a picture that is not there: refuse, or leave_out (of the written scene).
        reconstruction: folder of the COLMAP model below the scene (default: sparse/0, sparse, colmap/sparse/0, or the scene).
        pictures: folder of a COLMAP scene's pictures below it (default: images).
        seed: seed of what is drawn.
        feather: pixels over which an edited subject passes into the photograph.
        preset: settings of a published method in place of control: paper, masactrl, or fast.
        sampling: how several references enter.
        control: how a reference enters.
    """

    data: str
    reference: list[str]
    reference_mask: list[str] | None = None
    target_mask: str | None = None
    target_prompt: str = ""
    reference_prompt: str = ""
    negative_prompt: str = ""
    missing: Literal["refuse", "leave_out"] = "refuse"
    reconstruction: str | None = None
    pictures: str | None = None
    seed: Natural = 0
    feather: NonNegative = 2.0
    preset: Preset = "none"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    control: VisCtrlConfig = field(default_factory=VisCtrlConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reference:
            raise UserError("--reference: expected one picture or more")
        masks = self.reference_mask or []
        if len(masks) not in {0, 1, len(self.reference)}:
            raise UserError(
                f"--reference_mask: expected one, or {len(self.reference)} as of --reference, got {len(masks)}"
            )
        if len(self.reference) > len(masks) == 1 and masks[0] not in {"alpha", "white"}:
            raise UserError("--reference_mask is one file for several references: give one for each, alpha or white")
        if self.preset != "none" and self.control != VisCtrlConfig():
            raise UserError(f"--preset {self.preset} has settings of its own: leave out --control")
        if (self.reconstruction or self.pictures) and not self.data.startswith("colmap:"):
            raise UserError(f"--reconstruction and --pictures are for colmap:DIR, got --data {self.data}")
        if self.sampling.pool and self.sampling.kind == "single":
            raise UserError("--sampling.pool: views of kind single read their own reference alone: leave it at 0")

    @property
    def chosen(self) -> VisCtrlConfig:
        """The settings of the preset, else those of control."""
        return of_preset(self.preset) or self.control


@dataclass(frozen=True, kw_only=True)
class InvertSettings(ModelSettings):
    """Find the noise that gives a picture back, and show how well it does.

    Args:
        target: the picture.
        target_prompt: what it shows.
        control: settings, of which an inversion uses steps, refine and the guidance scales.
    """

    target: str
    target_prompt: str = ""
    control: VisCtrlConfig = field(default_factory=VisCtrlConfig)


@dataclass(frozen=True, kw_only=True)
class BankSettings(ModelSettings):
    """Record a reference's features once, for many edits.

    Args:
        reference: the picture.
        reference_mask: where its subject is: a file (white on black), alpha (of the picture), or white.
        reference_prompt: what it shows.
        control: how it will enter; an edit with the bank takes the same settings.
    """

    reference: str
    reference_mask: str | None = None
    reference_prompt: str = ""
    control: VisCtrlConfig = field(default_factory=VisCtrlConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.control.bank == "stream":
            raise UserError("--control.bank stream keeps no features: a bank needs memory, pinned or auto")
        if self.control.later_steps is not None or self.control.later_start is not None:
            raise UserError("a bank is of one schedule: leave out --control.later_steps and --control.later_start")


@dataclass(frozen=True, kw_only=True)
class VideoSettings(ModelSettings):
    """Put the subject of reference pictures into every frame of a video.

    Args:
        target: the video, or a folder of frames in the order of the numbers in their names.
        reference: pictures whose subject enters.
        target_mask: where the frames' subject is: a folder of masks with the names of the frames, a video of masks, one
            picture for all frames, alpha (of a folder's pictures), or white (all that is not nearly white).
        reference_mask: where the references' subject is: a file (for one reference), alpha, or white.
        target_prompt: what the result shows.
        reference_prompt: what the references show.
        negative_prompt: what the result does not show.
        frames: frames to edit, such as 0:40 (counted from 0; default: all).
        keyframes: number of frames that are edited first; all frames then attend to them and to the references.
        alpha: share of the references in what frames attend to; the rest is the keyframes'.
        batch: frames that go through the network at once.
        rate: frames per second of the video that a folder of frames becomes (default: a folder stays a folder).
        sound: copy the sound of the video.
        feather: pixels over which a result passes into the frame, at a mask.
        preset: settings of a published method in place of control: paper, masactrl, or fast.
        control: how the references enter.
    """

    target: str
    reference: list[str]
    target_mask: str | None = None
    reference_mask: str | None = None
    target_prompt: str = ""
    reference_prompt: str = ""
    negative_prompt: str = ""
    frames: str = ":"
    keyframes: Count = 3
    alpha: Annotated[float, Interval(gt=0, le=1)] = 0.5
    batch: Count = 1
    rate: Positive | None = None
    sound: bool = True
    feather: NonNegative = 2.0
    preset: Preset = "none"
    control: VisCtrlConfig = field(default_factory=VisCtrlConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.reference:
            raise UserError("--reference: expected at least one picture")
        if self.preset != "none" and self.control != VisCtrlConfig():
            raise UserError(f"--preset {self.preset} has settings of its own: leave out --control")
        if len(self.reference) > 1 and self.reference_mask not in {None, "alpha", "white"}:
            raise UserError("--reference_mask is one file for several references: give alpha or white")

    @property
    def chosen(self) -> VisCtrlConfig:
        """The settings of the preset, else those of control."""
        return of_preset(self.preset) or self.control


@dataclass(frozen=True, kw_only=True)
class InspectSettings(ModelSettings):
    """Show a model's layers, versions, attention backend, memory plan and license.

    Args:
        control: settings for the memory plan.
    """

    control: VisCtrlConfig = field(default_factory=VisCtrlConfig)


@dataclass(frozen=True, kw_only=True)
class Grid(Settings):
    """Values of settings, of which all combinations are compared.

    Args:
        start: values of --control.start.
        layers: values of --control.layers.
        strength: values of --control.strength.
        rounds: values of --control.rounds.
    """

    start: Annotated[list[Probability], Distinct()] = field(default_factory=list)
    layers: Annotated[list[str], Distinct()] = field(default_factory=list)
    strength: Annotated[list[Probability], Distinct()] = field(default_factory=list)
    rounds: Annotated[list[Count], Distinct()] = field(default_factory=list)

    @property
    def given(self) -> dict[str, list[Any]]:
        """The settings that have values, with these."""
        return {f.name: list(getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name)}


@dataclass(frozen=True, kw_only=True)
class CompareSettings(ModelSettings):
    """Compare settings, or published methods, on the same pairs of pictures.

    The pairs are the sample: differences are paired over them. Nothing is drawn at random, so there are no seeds.

    Args:
        target: pictures to edit.
        reference: picture whose subject enters.
        pairs: table in place of both, as for edit.
        target_mask: where the targets' subject is: a file (white on black), alpha (of the picture), or white.
        reference_mask: the same for the reference.
        target_prompt: what the result shows.
        reference_prompt: what the reference shows.
        negative_prompt: what the result does not show.
        grid: values of settings; every combination is an arm, on top of control.
        arms: settings to compare where there is no grid: control, and the presets fast, masactrl and paper; differences are
            taken to the first.
        encoder: encoder whose features compare pictures: packaged:lite0, timm:NAME, none, or auto (packaged:lite0 where
            it is installed, else none).
        encoder_weights: file of weights of timm:NAME, or random.
        feather: pixels over which a result passes into the photograph, at a mask.
        executor: where pairs are edited: processes:N, or null for here, one after another.
        control: settings of the arm control, and of what a grid leaves open.
    """

    target: list[str] | None = None
    reference: str | None = None
    pairs: str | None = None
    target_mask: str | None = None
    reference_mask: str | None = None
    target_prompt: str = ""
    reference_prompt: str = ""
    negative_prompt: str = ""
    grid: Grid = field(default_factory=Grid)
    arms: Annotated[list[Literal["control", "fast", "masactrl", "paper"]], Length(1), Distinct()] = field(
        default_factory=lambda: ["control", "fast", "masactrl", "paper"]
    )
    encoder: str = "auto"
    encoder_weights: str | None = None
    feather: NonNegative = 2.0
    executor: str | None = None
    control: VisCtrlConfig = field(default_factory=VisCtrlConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs is not None:
            given = [name for name in ("target", "reference", "target_mask", "reference_mask") if getattr(self, name)]
            if given:
                raise UserError(f"--pairs names targets, references and masks itself: leave out --{given[0]}")
        elif not self.target or self.reference is None:
            raise UserError("nothing to compare on: give --target FILE with --reference FILE, or --pairs FILE.csv")

    @property
    def configs(self) -> dict[str, VisCtrlConfig]:
        """Arm -> its settings."""
        found: dict[str, VisCtrlConfig] = {"": self.control}
        for name, values in self.grid.given.items():
            found = {
                f"{arm}, {name} {value}".removeprefix(", "): dataclasses.replace(config, **{name: value})
                for arm, config in found.items()
                for value in values
            }
        if self.grid.given:
            return found
        return {arm: self.control if arm == "control" else of_preset(arm) or self.control for arm in self.arms}


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Settings):
    """Measure finished edits: fidelity to the reference, structure, background, cost.

    Args:
        run: folder of a `visctrl edit`.
        encoder: encoder whose features compare pictures: packaged:lite0, timm:NAME, none, or auto (packaged:lite0 where
            it is installed, else none).
        encoder_weights: file of weights of timm:NAME, or random.
        device: where to compute; auto takes a GPU when there is one.
    """

    run: str
    encoder: str = "auto"
    encoder_weights: str | None = None
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class DemoSettings(tenfold.config.DemoSettings):
    """Train a small model on rendered blobs, and carry one material into another picture.

    Args:
        arch: denoiser: toy (minutes), or unet (a U-Net of diffusers, which trains four times as long).
        materials: colors, or photos as well: blobs cut out of real photographs, as a picture without a claim.
        executor: where models are trained and measured: processes:N, or null for here, one after another.
    """

    arch: Literal["toy", "unet"] = "toy"
    materials: Literal["colors", "photos"] = "colors"
    executor: str | None = None
