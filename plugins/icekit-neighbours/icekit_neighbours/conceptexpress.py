"""ConceptExpress's concept-wise optimisation (Hao et al., ECCV 2024): tokens that are split, contrasted and merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from icekit.builtin.denoising import masked_denoising_loss
from icekit.builtin.training import Group, Losses, Task, TaskLearner, TrainingSettings, step_generator
from icekit.builtin.wasserstein import wasserstein_distance
from icekit.protocols import AttentionMaps, Backbone, Learned, token_names
from icekit_neighbours.lesson import Lesson


class ConceptExpressSettings(TrainingSettings):
    """Settings of ``ConceptExpressLearner``; the defaults are the paper's, or are said to be ours."""

    steps: int = Field(500, ge=2, description="learning steps")
    split_share: float = Field(0.2, gt=0, lt=1, description="share of the steps before the split tokens are merged")
    split_tokens: int = Field(5, ge=1, description="tokens that each concept is split into at first")
    learning_rate: float = Field(5e-4, gt=0, description="AdamW's learning rate for the tokens, constant")
    attention_weight: float = Field(1e-5, ge=0, description="weight of the Wasserstein attention loss")
    contrastive_weight: float = Field(1e-3, ge=0, description="weight of the contrastive loss (our choice)")
    temperature: float = Field(0.07, gt=0, description="temperature of the contrastive loss (our choice)")
    initial_word: str = Field("object", min_length=1, description="word that every token starts from")
    initial_noise: float = Field(
        0.5, ge=0, description="how far split tokens start apart, in standard deviations of the word's row (our choice)"
    )
    attention_resolution: int | None = Field(
        None, description="side of the attention grid of the attention loss; by default 16 or the model's nearest to it"
    )


def contrastive_loss(tokens: Tensor, temperature: float) -> Tensor:
    """Pulls the split tokens of one concept together and pushes those of different concepts apart (InfoNCE form).

        L = - mean over i, k of  log ( sum_{k' != k} e(v_ik, v_ik') / sum_{(j, k') != (i, k)} e(v_ik, v_jk') ),
        e(u, v) = exp(cos(u, v) / temperature)

    Args:
        tokens: v, float ``[C, K, D]``: K tokens of each of C concepts.
        temperature: tau > 0.

    Returns:
        A scalar, at least zero; zero for one concept alone, and where a concept has one token only.
    """
    concepts, split, _ = tokens.shape
    if split == 1:
        return tokens.sum() * 0
    unit = nn.functional.normalize(tokens.flatten(0, 1), dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=tokens.device)
    similarity = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf)
    concept = torch.arange(concepts, device=tokens.device).repeat_interleave(split)
    same = concept[:, None] == concept[None, :]
    own = similarity.masked_fill(~same, -torch.inf).logsumexp(dim=1)
    return (similarity.logsumexp(dim=1) - own).mean()


class ConceptExpressLearner(TaskLearner[ConceptExpressSettings]):
    """One token a concept. It starts as several, which are merged into their mean after ``split_share`` of the steps:

        L = L_recon + attention_weight * L_attention + contrastive_weight * L_contrastive (while split)

    L_recon is the denoising loss inside of the concept's mask, L_attention the Wasserstein distance between the mask
    and the token's cross-attention. While split, a concept's prompt has one of its tokens, drawn at each step.
    The method knows no words: the region's word is not looked at. The row stands for the category, the instance and all
    attributes: it learns no attribute. All concepts are learned together, one element of the batch each.
    """

    Settings = ConceptExpressSettings

    def teach(self, task: Task) -> Learned:
        """See ``TaskLearner``."""
        settings, regions = self.settings, task.regions
        merged = [token_names(region, ())["category"] for region in regions]
        split = [[f"{name[:-1]}-split-{k}>" for k in range(settings.split_tokens)] for name in merged]
        start = self.backbone.word_embedding(settings.initial_word).float()
        generator = step_generator(task.seed, "split")
        rows = {}
        for name in [name for own in split for name in own]:
            noise = torch.randn(start.shape, generator=generator).to(start)
            rows[name] = start + settings.initial_noise * start.std() * noise
        rows |= {name: start for name in merged}
        express = Express(settings, self.backbone, task, rows)
        trainer = express.trainer(settings.steps)
        splitting = max(1, round(settings.split_share * settings.steps))

        trainer.train(
            "split",
            [Group({name: express.rows[name] for name in own}, settings.learning_rate) for own in split],
            range(1, splitting + 1),
            lambda step: express.losses(step, split),
            loss_scale=len(regions),
        )
        if trainer.done == splitting:
            for name, own in zip(merged, split, strict=True):
                mean = torch.stack([express.rows[each].data for each in own]).mean(dim=0)
                express.rows[name].data.copy_(mean)
        trainer.train(
            "merged",
            [Group({name: express.rows[name]}, settings.learning_rate) for name in merged],
            range(splitting + 1, settings.steps + 1),
            lambda step: express.losses(step, [[name] for name in merged]),
            loss_scale=len(regions),
        )
        return express.learned([express.rows[name] for name in merged])


class Express(Lesson):
    """A lesson of each concept in its own mask. ``attention_masks``: ``[2, C, r, r]``, covered shares of cells."""

    def __init__(
        self, settings: ConceptExpressSettings, backbone: Backbone, task: Task, rows: Mapping[str, Tensor]
    ) -> None:
        super().__init__(settings, backbone, task, rows)
        self._weights = settings.attention_weight, settings.contrastive_weight
        self._temperature = settings.temperature
        self._resolution, self.attention_masks = self.attention_grid(settings.attention_resolution)

    def losses(self, step: int, tokens: Sequence[Sequence[str]]) -> Iterator[Losses]:
        """One step's losses, chunk by chunk; tokens: those of each concept, one of which is in its prompt."""
        count = len(self.regions)
        draw = self.draw(step, count)
        chosen = torch.randint(len(tokens[0]), (count,), generator=step_generator(self.seed, "token", step)).tolist()
        names = [own[k] for own, k in zip(tokens, chosen, strict=True)]
        prompts = [self.prompt(draw.templates[i], names[i]) for i in range(count)]
        attention_weight, contrastive_weight = self._weights
        for chunk in self.chunks(count):
            share, sides = len(chunk) / count, draw.flipped[chunk]
            here = [prompts[i] for i in chunk]
            with self.backbone.capture_attention(cross=[self._resolution], places=("down", "up")) as maps:
                prediction, target = self.denoise(self.latents[sides], draw, chunk, here)
                attention = self._attention_of(maps, here, [names[i] for i in chunk])
            concepts = torch.tensor(chunk, device=sides.device)
            reconstruction = masked_denoising_loss(prediction, target, self.latent_masks[sides, concepts]).mean()
            distance = wasserstein_distance(self.attention_masks[sides, concepts], attention).mean()
            total = reconstruction + attention_weight * distance
            yield {"reconstruction": reconstruction * share, "attention": distance * share, "total": total * share}
        if len(tokens[0]) > 1:
            loss = contrastive_loss(
                torch.stack([torch.stack([self.rows[name] for name in own]) for own in tokens]), self._temperature
            )
            yield {"contrastive": loss, "total": contrastive_weight * loss}

    def _attention_of(self, maps: AttentionMaps, prompts: Sequence[str], names: Sequence[str]) -> Tensor:
        cross = maps.cross(self._resolution).float()
        return torch.stack([self.attention(cross[n], *each) for n, each in enumerate(zip(prompts, names, strict=True))])
