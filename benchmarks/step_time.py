"""What one learning step costs beside the bare UNet: ``python benchmarks/step_time.py [--model tabletop|sd21]``.

Timed, in turns in the same run, on the same batch (one element per concept):

- step: one step of ``IceLearner``, all of it: drawing, encoding the prompts with gradients, adding noise, the UNet
  forward with captured attention, the three losses, the backward pass to the tokens' rows, clipping and AdamW;
- bare: the UNet forward on its fused attention, a mean squared error, and the backward pass to the text conditioning
  (which learning a token needs at the least); parameters frozen, as in the step.

The weights are random (``sd21``: Stable Diffusion 2.1's configuration; ``tabletop``: the package's own model if it is
there), for time does not depend on them.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Mapping
from typing import Any

import click
import torch
from torch import Tensor, nn

from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.builtin.learners.ice import IceLearner, IceSettings
from icekit.protocols import Attribute, InputError, Region, Step

GOAL = 1.25

ATTRIBUTES = [Attribute("colour", "colour", ()), Attribute("material", "material", ())]


class NoCheckpoint:
    """Saving is timed nowhere: it happens every fiftieth step."""

    def load(self) -> None:
        """Nothing is ever saved."""

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Forget it."""


def random_pipeline(model: str) -> Any:
    """A Stable Diffusion pipeline with random weights and the UNet and text encoder of ``model``."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from icekit_tabletop.tokenizer import build_vocabulary
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    if model == "sd21":
        unet = UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=1024,
            attention_head_dim=[5, 10, 20, 20],
            use_linear_projection=True,
        )
        width, layers, heads, length, vae_levels = 1024, 23, 16, 77, 4
    else:
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(64, 128),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            cross_attention_dim=128,
            attention_head_dim=(2, 4),
            norm_num_groups=16,
            use_linear_projection=True,
        )
        width, layers, heads, length, vae_levels = 128, 4, 4, 40, 3
    vocabulary, merges = build_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=length,
            hidden_act="gelu",
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # The autoencoder only makes the latents, once, before the first step: a narrow one will do.
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * vae_levels,
        up_block_types=("UpDecoderBlock2D",) * vae_levels,
        block_out_channels=(8,) * vae_levels,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def load_backbone(model: str, device: torch.device) -> tuple[StableDiffusion, str]:
    """The backbone, and in words which weights it has."""
    if model == "tabletop":
        from icekit_tabletop.backbone import Tabletop

        try:
            return Tabletop(Tabletop.Settings(dtype="float32"), device), "the package's weights"
        except InputError:  # never trained
            pass
    torch.manual_seed(0)
    backbone = StableDiffusion.from_pipeline(random_pipeline(model), device, StableDiffusion.Settings(dtype="float32"))
    return backbone, "random weights"


class Stopwatch:
    """Seconds since it was made, the device's work included: on the clock, and of the process on all CPU cores."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self._now()

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """(clock, CPU)."""
        clock, cpu = self._now()
        return clock - self.start[0], cpu - self.start[1]


class BareUNet:
    """The UNet forward and backward alone, on ``batch`` latents of the backbone."""

    def __init__(self, backbone: StableDiffusion, batch: int) -> None:
        self.unet, self.device = backbone.unet, backbone.device
        self.processors = dict(backbone.unet.attn_processors)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            sequence = backbone.encode_prompts(["a photo of a cup"] * batch).parts["sequence"]
        self.sequence = nn.Parameter(sequence)
        self.noisy, self.target = (
            torch.randn(batch, *backbone.latent_shape, generator=generator).to(self.device) for _ in range(2)
        )
        self.timesteps = torch.randint(1000, (batch,), generator=generator).to(self.device)

    def seconds(self) -> tuple[float, float]:
        """Time one pass, with the UNet's own attention processors whatever is captured around it."""
        capturing = dict(self.unet.attn_processors)
        self.unet.set_attn_processor(dict(self.processors))
        try:
            self.sequence.grad = None
            stopwatch = Stopwatch(self.device)
            prediction = self.unet(self.noisy, self.timesteps, encoder_hidden_states=self.sequence).sample
            (prediction - self.target).square().mean().backward()
            return stopwatch.read()
        finally:
            self.unet.set_attn_processor(capturing)


@click.command()
@click.option("--model", type=click.Choice(["tabletop", "sd21"]), default="tabletop", show_default=True)
@click.option("--concepts", default=None, type=click.IntRange(1), help="Batch size.  [default: 3, sd21: 1]")
@click.option("--repeats", default=None, type=click.IntRange(2), help="Steps of each phase.  [default: 30, sd21: 3]")
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1), help="CPU threads.")
@click.option("--device", default="cpu", show_default=True)
def main(model: str, concepts: int | None, repeats: int | None, threads: int, device: str) -> None:
    """Print the time of one learning step over the time of the bare UNet."""
    torch.set_num_threads(threads)
    concepts = concepts or (3 if model == "tabletop" else 1)
    repeats = repeats or (30 if model == "tabletop" else 3)
    backbone, weights = load_backbone(model, torch.device(device))
    bare = BareUNet(backbone, concepts)

    height, width = backbone.image_size
    regions = []
    for index in range(concepts):  # side by side, a third of the height
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[height // 3 : 2 * height // 3, index * width // concepts : (index + 1) * width // concepts] = True
        regions.append(Region(index, "cup", 1.0, mask))

    # Pairs of (step, bare), each (clock, CPU).
    times: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {"object": [], "attributes": []}
    stopwatch = Stopwatch(backbone.device)

    def on_step(step: Step) -> None:
        nonlocal stopwatch
        learning = stopwatch.read()
        times[step.phase].append((learning, bare.seconds()))
        stopwatch = Stopwatch(backbone.device)

    parameters = sum(parameter.numel() for parameter in backbone.unet.parameters()) / 1e6
    click.echo(
        f"{model} ({weights}): UNet of {parameters:.1f} M parameters, latents {list(backbone.latent_shape)}, batch "
        f"{concepts}, {backbone.device.type}, {threads} threads, {len(ATTRIBUTES)} attributes"
    )
    bare.seconds()
    settings = IceSettings(steps=2 * repeats, max_batch=concepts, checkpoint_every=10**9)
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    IceLearner(settings, backbone).learn(image, regions, ATTRIBUTES, seed=0, checkpoint=NoCheckpoint(), on_step=on_step)
    for phase, pairs in times.items():
        pairs = pairs[1:]  # the first step of a phase also holds what is made once
        step, alone = (statistics.median(clock for clock, _ in values) for values in zip(*pairs, strict=True))
        ratio, cpu_ratio = (statistics.median(one[i] / other[i] for one, other in pairs) for i in (0, 1))
        click.echo(
            f"{phase:10}  step {step * 1e3:8.1f} ms   bare UNet forward + backward {alone * 1e3:8.1f} ms   "
            f"ratio {ratio:.2f} (goal {GOAL}; median of {len(pairs)} pairs), "
            f"in CPU time {cpu_ratio:.2f} (the fairer one on a busy machine)"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    click.echo(f"peak memory of the process {peak:.2f} GiB")
    if device.startswith("cuda"):
        click.echo(f"peak memory of the GPU {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
