"""What each family of models needs at its true size: ``python benchmarks/memory.py --device cuda --out memory.json``.

Weights are random, made on the device in the number format that a run takes; memory and time do not depend on them. Of
each family three settings are measured, each in a process of its own: ``auto`` (the defaults), ``checkpointing``
(``backbone.gradient_checkpointing``) and ``low-memory`` (``--low-memory``). Of each:

- load: the model alone, as it waits;
- look: one look at the picture, as the segmentor ``xattn`` takes it, the picture's encoding among it;
- step: a step of ``ice``'s first phase with two concepts (both in one pass), their pictures encoded before;
- attributes: a step of its second phase with three attributes;
- refine: a step of its last phase, a LoRA adapter of rank 4 with prior preservation;
- sample: one picture of 20 denoising steps with guidance, decoded;
- pass and decode, of which the table says nothing: one guided pass alone, and the autoencoder alone, both ways.

Memory is the peak: on cuda of what is allocated (``torch.cuda.max_memory_allocated``) and what PyTorch has taken from
the card for it (``max_memory_reserved``), on the CPU of the process (VmHWM). Seconds are of one step, the median.
``digest`` tells whether settings gave the same result: the losses of the first step, and sixteen pixels of the picture.
On the device ``meta`` models are made and counted, and nothing is measured. A case that runs out of memory says so, and
the others go on.
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from icekit.attention.looking import look_at
from icekit.backbones.common import predictor_dtype
from icekit.builtin.learners.ice import IceLearner
from icekit.builtin.learners.settings import IceSettings
from icekit.foreign import is_out_of_memory, said
from icekit.protocols import Attribute, Look, Region, Step

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "auto": {},
    "checkpointing": {"gradient_checkpointing": True},
    "low-memory": {"low_memory": "on"},
}
PHASES = ("load", "look", "step", "attributes", "refine", "sample")
ATTRIBUTES = [Attribute(name, name, ()) for name in ("colour", "material", "texture")]
GIB = 2**30


@dataclass(frozen=True)
class Maker:
    """Makes the parts of a model, each on the device and in its number format.

    predictor, text: of the noise predictor and of large text encoders. waiting: each is away as soon as it is made.
    """

    device: torch.device
    predictor: torch.dtype
    text: torch.dtype
    waiting: bool

    def part(self, make: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Any:
        """A part, whose parameters are born where and as they are to be."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                module = make()
        finally:
            torch.set_default_dtype(before)
        return module.to("cpu") if self.waiting and self.device.type != "meta" else module


# --- The families ----------------------------------------------------------------------------------------------------


def filled(tokens: Iterable[str], size: int) -> dict[str, int]:
    """A vocabulary of these tokens and so many that no text has: a table is as long as its vocabulary."""
    some = list(tokens)
    return {token: place for place, token in enumerate([*some, *(f"unused-{n}" for n in range(size - len(some)))])}


def clip_tokenizer(padding: str = "<|endoftext|>") -> Any:
    """A tokenizer with as many tokens as CLIP's."""
    from icekit.testing.tiny import tiny_tokenizer

    few = tiny_tokenizer()
    merges = [tuple(merge) for merge in json.loads(few.backend_tokenizer.to_str())["model"]["merges"]]
    known = sorted(few.get_vocab(), key=few.get_vocab().get)
    vocabulary = filled(known[:-2], 49406) | {known[-2]: 49406, known[-1]: 49407}
    return type(few)(vocab=vocabulary, merges=merges, pad_token=padding, model_max_length=77)


def of_layout(name: str, maker: Maker) -> dict[str, Any]:
    """The parts of a pipeline, by the configurations that icekit ships for models in one file."""
    import diffusers
    import transformers

    from icekit.backbones.file_layouts import read_layout

    layout = read_layout(f"package:icekit/backbones/layouts/{name}.json")
    files = layout.files
    parts: dict[str, Any] = {}
    for part, entry in files["model_index.json"].items():
        if not isinstance(entry, list) or entry[1] is None:
            continue
        library, kind = entry
        if part.startswith("tokenizer"):
            parts[part] = clip_tokenizer(layout.padding[part])
        elif part == "scheduler":
            parts[part] = getattr(diffusers, kind).from_config(files["scheduler/scheduler_config.json"])
        elif library == "diffusers":
            configuration, model = files[f"{part}/config.json"], getattr(diffusers, kind)
            dtype = maker.predictor if part == "unet" else torch.float32
            parts[part] = maker.part(lambda m=model, c=configuration: m.from_config(c), dtype)
        elif part.startswith("text_encoder"):
            model, configuration = (
                getattr(transformers, kind),
                transformers.CLIPTextConfig(**files[f"{part}/config.json"]),
            )
            parts[part] = maker.part(lambda m=model, c=configuration: m(c))
    return parts


def sd21(maker: Maker) -> Any:
    """Stable Diffusion 2.1, 512 pixels."""
    from diffusers import StableDiffusionPipeline

    from icekit.backbones.stable_diffusion import StableDiffusion

    options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusion, StableDiffusionPipeline(**of_layout("sd2", maker) | options)


def sdxl(maker: Maker) -> Any:
    """Stable Diffusion XL, 1024 pixels."""
    from diffusers import StableDiffusionXLPipeline

    from icekit.backbones.stable_diffusion_xl import StableDiffusionXL

    return StableDiffusionXL, StableDiffusionXLPipeline(**of_layout("sdxl", maker), add_watermarker=False)


def clip(maker: Maker, width: int, layers: int, *, projected: bool, activation: str) -> Any:
    """A CLIP text encoder: L is 768 wide with 12 layers, bigG 1280 with 32."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    configuration = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=activation,
        projection_dim=width,
        eos_token_id=49407,
    )
    return maker.part(lambda: (CLIPTextModelWithProjection if projected else CLIPTextModel)(configuration))


def t5(maker: Maker) -> dict[str, Any]:
    """T5-XXL's encoder, and a tokenizer with as many tokens."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = ["\u2581", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    pieces = list(filled(["<pad>", "</s>", "<unk>", *letters], 32100))
    tokenizer = T5TokenizerFast(vocab=[(piece, -3.0) for piece in pieces], extra_ids=0, model_max_length=512)
    configuration = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return {"tokenizer": tokenizer, "text_encoder": maker.part(lambda: T5EncoderModel(configuration), maker.text)}


def kl_autoencoder(maker: Maker, **configuration: Any) -> Any:
    """An autoencoder with 16 channels, as Stable Diffusion 3's, FLUX.1's and Z-Image's."""
    from diffusers import AutoencoderKL

    return maker.part(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            sample_size=1024,
            use_quant_conv=False,
            use_post_quant_conv=False,
            **configuration,
        )
    )


def sd3(maker: Maker) -> Any:
    """Stable Diffusion 3.5 medium, 1024 pixels, with T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from icekit_dit.sd3 import StableDiffusion3

    large = t5(maker)
    return StableDiffusion3, StableDiffusion3Pipeline(
        transformer=maker.part(
            lambda: SD3Transformer2DModel(
                sample_size=128,
                num_layers=24,
                num_attention_heads=24,
                caption_projection_dim=1536,
                pos_embed_max_size=384,
                dual_attention_layers=tuple(range(13)),
                qk_norm="rms_norm",
                out_channels=16,
            ),
            maker.predictor,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(maker, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=clip(maker, 768, 12, projected=True, activation="quick_gelu"),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(maker, 1280, 32, projected=True, activation="gelu"),
        tokenizer_2=clip_tokenizer("!"),
        text_encoder_3=large["text_encoder"],
        tokenizer_3=large["tokenizer"],
    )


def flux(maker: Maker) -> Any:
    """FLUX.1 dev, 1024 pixels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from icekit_dit.flux import Flux

    large = t5(maker)
    return Flux, FluxPipeline(
        transformer=maker.part(lambda: FluxTransformer2DModel(guidance_embeds=True), maker.predictor),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=kl_autoencoder(maker, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=clip(maker, 768, 12, projected=False, activation="quick_gelu"),
        tokenizer=clip_tokenizer(),
        text_encoder_2=large["text_encoder"],
        tokenizer_2=large["tokenizer"],
    )


def sana(maker: Maker) -> Any:
    """Sana 1.6B, 1024 pixels."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from icekit_dit.sana import Sana
    from tokenizers import AddedToken, normalizers, processors
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    letters = ["\u2581", "\n", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    # The words of the pipeline's instruction are a piece each: it is about as long as the real tokenizer makes it.
    words = sorted(set(re.findall(r"[A-Za-z]{2,}", " ".join(instruction))))
    vocabulary = filled(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, *words], 256000)
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_tokens([AddedToken(word, lstrip=True, single_word=True, normalized=False) for word in words])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    begin = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])])
    tokenizer.backend_tokenizer.post_processor = begin
    gemma = Gemma2Config(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
    )
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return Sana, SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=maker.part(lambda: Gemma2Model(gemma), maker.text),
        vae=maker.part(
            lambda: AutoencoderDC(
                encoder_block_types=blocks,
                decoder_block_types=blocks,
                upsample_block_type="interpolate",
                downsample_block_type="conv",
                scaling_factor=0.41407,
            )
        ),
        transformer=maker.part(SanaTransformer2DModel, maker.predictor),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def qwen_tokenizer() -> Any:
    """A tokenizer with as many tokens as Qwen 3's, and a chat's marks."""
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer(
        vocab=filled([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"], 151643),
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=131072,
    )
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def qwen3_4b() -> Any:
    """The configuration of Qwen 3 4B."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )


def z_image(maker: Maker) -> Any:
    """Z-Image, 1024 pixels."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from icekit_dit.z_image import ZImage
    from transformers import Qwen3Model

    def transformer() -> Any:
        made = ZImageTransformer2DModel()
        for padding in (made.x_pad_token, made.cap_pad_token):  # which have no first values
            torch.nn.init.zeros_(padding)
        return made

    return ZImage, ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl_autoencoder(maker, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=maker.part(lambda: Qwen3Model(qwen3_4b()), maker.text),
        tokenizer=qwen_tokenizer(),
        transformer=maker.part(transformer, maker.predictor),
    )


def flux2_klein(maker: Maker) -> Any:
    """FLUX.2-klein 4B, distilled, 1024 pixels."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from diffusers import Flux2Transformer2DModel as Transformer
    from icekit_dit.flux2_klein import Flux2Klein
    from transformers import Qwen3ForCausalLM

    return Flux2Klein, Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=maker.part(AutoencoderKLFlux2),
        text_encoder=maker.part(lambda: Qwen3ForCausalLM(qwen3_4b()), maker.text),
        tokenizer=qwen_tokenizer(),
        transformer=maker.part(
            lambda: Transformer(
                num_layers=5,
                num_single_layers=20,
                num_attention_heads=24,
                joint_attention_dim=7680,
                guidance_embeds=False,
            ),
            maker.predictor,
        ),
        is_distilled=True,
    )


def tiny(maker: Maker) -> Any:
    """Stable Diffusion 1.x in small: whether this program works."""
    from icekit.backbones.stable_diffusion import StableDiffusion
    from icekit.testing.tiny import tiny_pipeline

    return StableDiffusion, tiny_pipeline(version=1)


FAMILIES: dict[str, Callable[[Maker], Any]] = {"sd21": sd21, "sdxl": sdxl}
"""What is measured if nothing is named. Each gives the class of a backbone and a pipeline that it is made from."""
if importlib.util.find_spec("icekit_dit") is not None:
    FAMILIES |= {"sd3": sd3, "sana": sana, "z-image": z_image, "flux": flux, "flux2-klein": flux2_klein}
OTHERS: dict[str, Callable[[Maker], Any]] = {"tiny": tiny}


# --- One case --------------------------------------------------------------------------------------------------------


class NoCheckpoint:
    """Keeps nothing: saving is not what is measured."""

    def load(self) -> None:
        """Nothing is ever saved."""

    def save(self, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Forget it."""


class Case:
    """One family with one setting: its measurements, written to a file as they come."""

    def __init__(
        self, family: str, setting: str, device: torch.device, out: Path, steps: int, sample_steps: int
    ) -> None:
        self.device, self.out, self.steps, self.sample_steps = device, out, steps, sample_steps
        self.row: dict[str, Any] = {"family": family, "setting": setting, "device": name_of(device)}
        self.row |= {"torch": torch.__version__, "phases": {}, "digest": {}}

    def start(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif self.device.type == "cpu":
            Path("/proc/self/clear_refs").write_text("5")

    def end(self, phase: str, seconds: list[float] | float) -> None:
        """Note the peak since ``start``."""
        values = seconds if isinstance(seconds, list) else [seconds]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            peak, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
        else:
            status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
            peak = reserved = int(status.split()[0]) / 2**20
        found = {"peak_gib": round(peak, 3), "reserved_gib": round(reserved, 3)}
        self.row["phases"][phase] = found | {"seconds": round(statistics.median(values), 4)}
        self.write()

    def held(self) -> float:
        """What is taken now, GiB."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated() / GIB
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 2**20

    def failed(self, phase: str, error: BaseException) -> None:
        """Note that a phase has no result."""
        why = "out of memory" if is_out_of_memory(error) else said(error)
        self.row["phases"][phase] = {"failed": why}
        print(f"{self.row['family']}/{self.row['setting']} {phase}: {said(error)}", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """Write what is known so far."""
        self.out.write_text(json.dumps(self.row))

    def now(self) -> float:
        """Seconds, the device's work included."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def measure(self) -> None:
        """All phases, one after the other."""
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True, warn_only=True)
        family, setting = str(self.row["family"]), str(self.row["setting"])
        waiting = setting == "low-memory"
        predictor = predictor_dtype("auto", self.device)
        text = torch.float32 if predictor == torch.float32 else torch.bfloat16
        maker = Maker(self.device, predictor, text, waiting)
        self.start()
        begun = self.now()
        try:
            kind, pipeline = (FAMILIES | OTHERS)[family](maker)
            parts = {name: one for name, one in pipeline.components.items() if isinstance(one, torch.nn.Module)}
            self.row["million_weights"] = {
                name: round(sum(one.numel() for one in module.parameters()) / 1e6) for name, module in parts.items()
            }
            if self.device.type == "meta":  # there is nothing to compute with
                self.write()
                return
            wanted = kind.Settings(**{"model": family} | SETTINGS[setting])
            self.backbone = kind.from_pipeline(pipeline, self.device, wanted)
        except Exception as error:
            self.failed("load", error)
            return
        self.row["dtype"] = str(predictor).removeprefix("torch.")
        self.row["image_size"] = list(self.backbone.image_size)
        self.row["held_gib"] = round(self.held(), 3)
        self.end("load", self.now() - begun)
        runs = {"look": self.look, "step": self.learn, "refine": self.refine, "sample": self.sample}
        runs |= {"pass": self.guided_pass, "decode": self.decode}
        for phase, run in runs.items():
            try:
                run()
            except Exception as error:
                self.failed(phase, error)

    def picture(self) -> torch.Tensor:
        """A picture of noise."""
        return torch.rand(3, *self.backbone.image_size, generator=torch.Generator().manual_seed(0))

    def look(self) -> None:
        """A look at the picture."""
        times: list[float] = []
        self.start()
        for _ in range(2):
            begun = self.now()
            generator = torch.Generator().manual_seed(0)
            look = Look(words=(16,), pixels=(32,) if self.backbone.pixel_grids else ())
            look_at(self.backbone, self.picture(), "a photo of a cup", look, shares=(0.15,), generator=generator)
            times.append(self.now() - begun)
        self.end("look", times[-1])

    def _learn(self, settings: IceSettings, attributes: list[Attribute], phases: list[str]) -> None:
        """Learn two concepts, and note each of these phases; the first step of each is not looked at."""
        height, width = self.backbone.image_size
        regions = []
        for index in range(2):
            mask = torch.zeros(height, width, dtype=torch.bool)
            mask[height // 4 : 3 * height // 4, index * width // 2 : (index + 1) * width // 2] = True
            regions.append(Region(index, "cup", 1.0, mask))
        times: list[float] = []
        current, begun = "", 0.0

        def on_step(step: Step) -> None:
            nonlocal current, begun, times
            if step.phase != current:
                if current in phases:
                    self.end(names[current], times)
                current, times = step.phase, []
                self.row["digest"].setdefault(names[current], {k: float(f"{v:.6g}") for k, v in step.losses.items()})
                self.start()
            else:
                times.append(self.now() - begun)
            begun = self.now()

        names = {"object": "step", "attributes": "attributes", "refine": "refine"}
        IceLearner(settings, self.backbone).learn(
            self.picture(), regions, attributes, seed=0, checkpoint=NoCheckpoint(), on_step=on_step
        )
        if current in phases:
            self.end(names[current], times)

    def learn(self) -> None:
        """The phases in which tokens are learned."""
        settings = IceSettings(steps=2 * (self.steps + 1), checkpoint_every=10**6)
        self._learn(settings, ATTRIBUTES, ["object", "attributes"])

    def refine(self) -> None:
        """The phase in which the noise predictor is trained by a LoRA adapter."""
        settings = IceSettings(
            steps=2, refine_steps=self.steps + 1, prior_images=2, prior_steps=1, checkpoint_every=10**6
        )
        self._learn(settings, ATTRIBUTES, ["refine"])

    def sample(self) -> None:
        """A picture, after a short one that is not looked at."""
        self.backbone.generate(["a photo of a cup"], seeds=[0], steps=2)
        self.start()
        begun = self.now()
        [image] = self.backbone.generate(["a photo of a cup"], seeds=[0], steps=self.sample_steps)
        self.row["digest"]["pixels"] = list(image.convert("L").resize((4, 4)).tobytes())
        self.end("sample", self.now() - begun)

    @torch.no_grad()
    def guided_pass(self) -> None:
        """One pass of the noise predictor, with guidance: what drawing takes, without the autoencoder."""
        encoded = self.backbone.encode_prompts(["", "a photo of a cup"])
        noisy = torch.zeros(2, *self.backbone.latent_shape, device=self.device)
        self.backbone.predict(noisy, torch.ones(2, device=self.device), encoded)
        self.start()
        begun = self.now()
        self.backbone.predict(noisy, torch.ones(2, device=self.device), encoded)
        self.end("pass", self.now() - begun)

    @torch.no_grad()
    def decode(self) -> None:
        """One picture through the autoencoder, both ways."""
        self.backbone.encode_images(self.picture()[None])
        self.start()
        begun = self.now()
        self.backbone.decode_latents(self.backbone.encode_images(self.picture()[None]))
        self.end("decode", self.now() - begun)


def name_of(device: torch.device) -> str:
    """What a device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


# --- All cases -------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """The measurements as a table of Markdown: peak memory in GiB, and seconds."""
    heads = ["load", "look", "step (ice, phase one)", "step (attributes)", "step (refinement, LoRA)", "picture"]
    lines = [f"| family | setting | {' | '.join(heads)} |", "| --- " * (2 + len(heads)) + "|"]
    for row in rows:
        cells = []
        for phase in PHASES:
            found = row["phases"].get(phase)
            if found is None:
                cells.append("–")
            elif "failed" in found:
                cells.append(found["failed"][:60].replace("|", "/"))
            else:
                time_ = "" if phase == "load" else f", {found['seconds']:.3g} s"
                cells.append(f"{found['peak_gib']:.1f} GiB{time_}")
        size = "×".join(map(str, row.get("image_size", [])))
        family = f"{row['family']} {size} {row.get('dtype', '')}".strip()
        lines.append(f"| {family} | {row['setting']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def coefficients(rows: list[dict[str, Any]]) -> str:
    """What ``icekit.backbones.estimate.Measured`` holds of each family, from the settings ``auto`` and
    ``checkpointing``: GiB a million pixels of one picture, the noise predictor in 16 bits.
    """
    lines = []
    found = {(row["family"], row["setting"]): row for row in rows}
    for family in dict.fromkeys(row["family"] for row in rows):
        auto, twice = found.get((family, "auto")), found.get((family, "checkpointing"))
        if auto is None or twice is None:
            continue
        wide = 2 if auto.get("dtype") == "float32" else 1
        million = auto["image_size"][0] * auto["image_size"][1] / 1e6

        def beyond(row: dict[str, Any], *phases: str) -> float:
            peaks = [row["phases"].get(phase, {}).get("peak_gib") for phase in phases]
            return max((peak for peak in peaks if peak is not None), default=math.nan) - row["held_gib"]

        values = {
            "learning": beyond(auto, "step", "attributes", "refine") / 2 / wide / million,
            "checkpointed": beyond(twice, "step", "attributes", "refine") / 2 / wide / million,
            "drawing": beyond(auto, "pass") / wide / million,
            "decoding": beyond(auto, "decode") / million,
        }
        lines.append(f"{family}: " + ", ".join(f"{name}={value:.2f}" for name, value in values.items()))
    return "\n".join(lines)


def run_case(family: str, setting: str, options: list[str], limit: float | None) -> dict[str, Any]:
    """A case in a process of its own; what it had measured when it ended, however it ended."""
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / "row.json"
        command = [sys.executable, __file__, *options, "--one", f"{family}/{setting}", "--out", str(found)]
        why = None
        try:
            done = subprocess.run(command, timeout=limit)
            why = f"ended with status {done.returncode}" if done.returncode else None
        except subprocess.TimeoutExpired:
            why = "not in time"
        row = json.loads(found.read_text()) if found.exists() else {"family": family, "setting": setting, "phases": {}}
        missing = [phase for phase in PHASES if phase not in row["phases"]]
        if why and missing:
            row["phases"][missing[0]] = {"failed": why}
        return row


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--only", multiple=True, metavar="FAMILY[/SETTING]", help="Measure this; give it once for each.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("memory.json"), show_default=True)
@click.option("--limit-seconds", type=float, help="Begin nothing after so long, and end what is running.")
@click.option("--case-seconds", type=float, help="End a case after so long.")
@click.option("--steps", default=4, show_default=True, help="Timed steps of each phase, after one that is not.")
@click.option("--sample-steps", default=20, show_default=True, help="Denoising steps of the picture.")
@click.option("--show", is_flag=True, help="Measure nothing: print what is in the file, and what icekit reckons with.")
@click.option("--one", hidden=True)
def main(
    device: str,
    only: tuple[str, ...],
    out: Path,
    limit_seconds: float | None,
    case_seconds: float | None,
    steps: int,
    sample_steps: int,
    show: bool,
    one: str | None,
) -> None:
    """Measure memory and time of families of models at their true size."""
    if one is not None:
        family, _, setting = one.partition("/")
        Case(family, setting, torch.device(device), out, steps, sample_steps).measure()
        return
    if show:
        rows = json.loads(out.read_text())
        print(f"{table(rows)}\n\n{coefficients(rows)}")
        return
    begun, rows = time.monotonic(), []
    wanted = only or tuple(FAMILIES)
    options = ["--device", device, "--steps", str(steps), "--sample-steps", str(sample_steps)]
    cases = [(family, setting) for family in FAMILIES | OTHERS for setting in SETTINGS
             if family in wanted or f"{family}/{setting}" in wanted]  # fmt: skip
    if not cases:
        raise click.UsageError(f"--only takes {', '.join(FAMILIES | OTHERS)}, alone or with /{', /'.join(SETTINGS)}")
    for family, setting in cases:
        left = None if limit_seconds is None else limit_seconds - (time.monotonic() - begun)
        if left is not None and left <= 0:
            print(f"{family}/{setting}: not begun, the time is over", flush=True)
            continue
        limits = [limit for limit in (left, case_seconds) if limit is not None]
        rows.append(run_case(family, setting, options, min(limits, default=None)))
        out.write_text(json.dumps(rows, indent=1) + "\n")
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(rows), flush=True)


if __name__ == "__main__":
    main()
