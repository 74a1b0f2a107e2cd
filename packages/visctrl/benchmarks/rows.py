"""An edit of several rounds against the released algorithm at its own settings: rows of the network, and time.

The released code needs diffusers 0.15, so its algorithm is written out from its description, with rounds that iterate (its
own read the original target again): both pictures are inverted in every round with guidance, then 4 rows per branch are
denoised, of which one is read. Small U-Net of diffusers with random weights; latents in place of pictures.
"""

import diffusers
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from visctrl.config import VisCtrlConfig
from visctrl.engine import VisCtrl
from visctrl.families import Conditions, ModelAdapter, Rows
from visctrl.layers import self_attention_layers
from visctrl.steppers import DDIMStepper

from tenfold.bench import Comparison, compare, counted, main

ROUNDS = 5


class Bare(ModelAdapter):
    """The U-Net alone, with two fixed texts."""

    family = "bare"

    @classmethod
    def of(cls, source: object, scheduler: object = None) -> None:
        """None: it is not looked for."""

    def encode(self, images: Tensor) -> Tensor:
        """Latents are what they are."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Latents are what they are."""
        return latents

    def conditions(self, prompt: str = "", negative: str = "", **more: object) -> Conditions:
        """Texts by a seed."""
        null, own = torch.randn(2, 1, 5, 32, generator=torch.Generator().manual_seed(7))
        return Conditions({"encoder_hidden_states": own}, {"encoder_hidden_states": null})

    def network(self, z: Tensor, timestep: float, rows: Rows) -> Tensor:
        """One call."""
        return self.model(z, timestep, **rows).sample


class Official:
    """The released algorithm; counts its rows."""

    def __init__(self, adapter: Bare) -> None:
        self.adapter, self.rows = adapter, 0
        told = adapter.conditions()
        assert told.uncond is not None
        self.words = torch.cat([told.uncond["encoder_hidden_states"], told.cond["encoder_hidden_states"]])
        self.layers = [adapter.model.get_submodule(x.name) for x in self_attention_layers(adapter.model)[1:]]

    def ask(self, z: Tensor, t: float, guidance: float) -> Tensor:
        """Guided noise of all rows."""
        self.rows += 2 * len(z)
        null, own = self.adapter.model(
            z.repeat(2, 1, 1, 1), t, self.words.repeat_interleave(len(z), dim=0)
        ).sample.chunk(2)
        return null + guidance * (own - null)

    def invert(self, z: Tensor, stepper: DDIMStepper, guidance: float) -> list[Tensor]:
        """Plain inversion."""
        path = [z]
        for i in range(1, len(stepper) + 1):
            z = stepper.move(z, self.ask(z, stepper.timesteps[i - 1], guidance), z, i, i - 1, i)
            path.append(z)
        return path

    def __call__(self, target: Tensor, reference: Tensor) -> Tensor:
        """All rounds."""
        self.rows = 0

        def exchange(_: object, __: object, output: Tensor) -> Tensor:
            return output[[0, 1, 0, 3, 4, 5, 4, 7]]

        for number in range(ROUNDS):
            n, guidance = (10, 6.0) if number == 0 else (5, 4.0)
            stepper = whole(self.adapter.scheduler, n)
            own, other = self.invert(target, stepper, guidance), self.invert(reference, stepper, guidance)
            free, z = other[-1], own[-1]
            for i in range(n, 0, -1):
                rows = torch.cat([other[i], free, z, own[i]])
                injects = n - i >= int(0.2 * n + 0.5)
                parts = [part for x in self.layers for part in (x.to_k, x.to_v)] if injects else []
                handles = [part.register_forward_hook(exchange) for part in parts]
                out = self.ask(rows, stepper.timesteps[i - 1], guidance)
                for handle in handles:
                    handle.remove()
                moved = stepper.move(rows, out, rows, i, i, i - 1)
                free, z = moved[1:2], moved[2:3]
            target = z
        return target


def whole(scheduler: DDIMScheduler, steps: int) -> DDIMStepper:
    """The schedule with the identity that the released settings make of its last step."""
    alphas = [float(x) for x in scheduler.alphas_cumprod.double()]
    times = [i * (1000 // steps) for i in range(steps)]
    return DDIMStepper([alphas[0], *(alphas[t] for t in times)], [float(t) for t in times])


def small_unet(size: int) -> UNet2DConditionModel:
    """A text-conditioned U-Net with random weights, for latents of ``size``."""
    model: UNet2DConditionModel = UNet2DConditionModel(
        sample_size=size,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=32,
    ).eval()
    return model


@torch.inference_mode()
def measure() -> list[Comparison]:
    """Rows and time of one edit."""
    torch.manual_seed(0)
    unet = small_unet(16)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    adapter = Bare(None, unet, scheduler)
    target, reference = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    engine, official = VisCtrl(adapter, VisCtrlConfig.paper(rounds=ROUNDS)), Official(adapter)

    def ours() -> Tensor:
        return engine.edit(target, engine.reference(reference)).latents

    def equal(a: Tensor, b: Tensor) -> str:
        gap = float((a - b).abs().max() / b.abs().max())
        assert gap < 1e-3, gap
        return f"largest difference {gap:.1e} of the largest latent"

    shape = f"{ROUNDS} rounds, 10 steps then 5, guided, start 0.2, small U-Net at 16 x 16"
    timed = compare(
        "edit_time", ours, lambda: official(target, reference), equal, shape=shape, required=">= 2.4", pairs=5
    )
    before = engine.rows
    ours()
    rows = engine.rows - before
    return [
        counted("edit_rows", rows, official.rows, shape=shape, unit="rows", required=">= 2.4", equal=timed.equal),
        timed,
    ]


if __name__ == "__main__":
    raise SystemExit(main("visctrl", {"diffusers": diffusers.__version__}, measure))
