"""ConceptExpress's concept-wise optimisation (Hao et al., ECCV 2024): tokens that are split, contrasted and merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icekit.learning.denoising import latent_mask
from icekit.learning.lesson import Lesson
from icekit.learning.rows import assign, flat, mean_token
from icekit.learning.training import Group, Losses, Task, TaskLearner
from icekit.learning.wasserstein import wasserstein_distance
from icekit.protocols import Backbone, Capability, Learned, Tokens
from icekit.randomness import seeded_generator
from icekit.words import read_vocabulary
from icekit_neighbours.lesson import instance_name, starting_token
from icekit_neighbours.looking import look, mean_self_attention
from icekit_neighbours.settings import ConceptExpressSettings


def contrastive_loss(tokens: Tensor, temperature: float) -> Tensor:
    """Pulls the split tokens of one concept together and pushes those of different concepts apart.

    Supervised contrastive loss in its published form (Khosla et al., NeurIPS 2020, eq. 2), the mean of the positives'
    log-probabilities outside of the logarithm:

        L = mean over i of  -1 / |P(i)| sum_{p in P(i)} log ( e(i, p) / sum_{a != i} e(i, a) ),
        e(u, v) = exp(cos(u, v) / temperature)

    with i, p, a over all tokens and P(i) the other tokens of i's concept.

    Args:
        tokens: float ``[C, K, D]``: K tokens of each of C concepts.
        temperature: above zero.

    Returns:
        A scalar, at least log(K - 1); zero where a concept has one token only.
    """
    concepts, split, _ = tokens.shape
    if split == 1:
        return tokens.sum() * 0
    unit = nn.functional.normalize(tokens.flatten(0, 1), dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=tokens.device)
    log_probability = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf).log_softmax(dim=1)
    concept = torch.arange(concepts, device=tokens.device).repeat_interleave(split)
    positive = (concept[:, None] == concept[None, :]) & ~itself
    return -log_probability[positive].mean()


class ConceptExpressLearner(TaskLearner[ConceptExpressSettings]):
    """One token a concept. It starts as several, which are merged into their mean after ``split_share`` of the steps:

        L = L_recon + attention_weight * L_attention + contrastive_weight * L_contrastive (while split)

    L_recon is the denoising loss inside of the concept's mask, L_attention the Wasserstein distance between the token's
    cross-attention and the mean self-attention of the mask's places. After the merge there is a prompt of all concepts,
    "a photo of v_1 and v_2", too, with the union of their masks. The method knows no words: by default the region's
    word is not looked at. A concept's token is its instance: neither a category nor an attribute is learned.
    """

    Settings = ConceptExpressSettings
    parts = ("instance",)

    @staticmethod
    def needs_with(settings: ConceptExpressSettings) -> list[Capability]:
        """What the backbone must be able to do."""
        return ["attention", "similarity"] if settings.attention_target == "self_attention" else ["attention"]

    def teach(self, task: Task) -> Learned:
        """See ``TaskLearner``.

        Raises:
            InputError: the concepts do not fit into one prompt.
        """
        settings, count = self.settings, len(task.regions)
        merged = [instance_name(region) for region in task.regions]
        split = [[f"{name[:-1]}-split-{k}>" for k in range(settings.split_tokens)] for name in merged]
        express = Express(settings, self.backbone, task, self._starting_tokens(task, merged, split))
        splitting = max(1, round(settings.split_share * settings.steps))
        each = settings.updates == "each"
        turns = [(concept, name) for concept, own in enumerate(split) for name in own]
        first = splitting * (len(turns) if each else 1)
        last = first + (settings.steps - splitting) * (count + settings.joint if each else 1)
        trainer = express.trainer(last)

        def split_losses(update: int) -> Iterator[Losses]:
            if each:
                concept, name = turns[(update - 1) % len(turns)]
                yield from express.losses(update, [concept], [name])
            else:
                yield from express.losses(update, range(count), express.draw_tokens(update, split))
            yield from express.contrast(split)

        def merged_losses(update: int) -> Iterator[Losses]:
            if not each:
                yield from express.losses(update, range(count), merged)
                if settings.joint:
                    yield express.joint_losses(update, merged, share=1 / count)
                return
            turn = (update - first - 1) % (count + settings.joint)
            if turn < count:
                yield from express.losses(update, [turn], [merged[turn]])
            else:
                yield express.joint_losses(update, merged)

        # Where one optimiser step is for all concepts, each learns as if it were alone.
        scale = 1.0 if each else float(count)
        groups = [Group(flat(express.tokens, own), settings.learning_rate) for own in split]
        trainer.train("split", groups, range(1, first + 1), split_losses, loss_scale=scale)
        if trainer.done == first:
            for name, own in zip(merged, split, strict=True):
                assign(express.tokens[name], mean_token([express.tokens[one] for one in own]))
        groups = [Group(flat(express.tokens, [name]), settings.learning_rate) for name in merged]
        trainer.train("merged", groups, range(first + 1, last + 1), merged_losses, loss_scale=scale)
        return express.learned(merged)

    def _starting_tokens(
        self, task: Task, merged: Sequence[str], split: Sequence[Sequence[str]]
    ) -> dict[str, dict[str, Tensor]]:
        """Where all tokens start; the merged ones get their rows by the merge."""
        settings, backbone = self.settings, self.backbone
        generator = seeded_generator(task.seed, "split")
        tokens: dict[str, dict[str, Tensor]] = {}
        words = known_words(task, backbone) if settings.start == "random" else []
        for region, own in zip(task.regions, split, strict=True):
            if settings.start == "random":
                chosen = torch.randint(len(words), (len(own),), generator=generator).tolist()
                tokens |= {name: backbone.word_rows(words[n]) for name, n in zip(own, chosen, strict=True)}
                continue
            start = starting_token(region, task.attributes, backbone, settings.start)
            for name in own:
                noise = {encoder: torch.randn(row.shape, generator=generator).to(row) for encoder, row in start.items()}
                tokens[name] = {
                    encoder: row + settings.initial_noise * row.std() * noise[encoder] for encoder, row in start.items()
                }
        return tokens | {name: tokens[own[0]] for name, own in zip(merged, split, strict=True)}


def known_words(task: Task, backbone: Backbone) -> list[str]:
    """Words that a random row may be of: icekit's nouns and the attributes' words, those that the backbone knows."""
    words = [*read_vocabulary(None), *(word for one in task.attributes for word in one.vocabulary)]
    known = [word for word in dict.fromkeys(words) if backbone.knows(word)]
    return known or [region.word for region in task.regions]


class Express(Lesson):
    """A lesson of each concept in its own mask.

    targets: ``[2, C, h, w]``, at least zero, where each concept's attention is drawn to, plain and mirrored.
    """

    settings: ConceptExpressSettings

    def __init__(self, settings: ConceptExpressSettings, backbone: Backbone, task: Task, tokens: Tokens) -> None:
        super().__init__(settings, backbone, task, tokens)
        self.targets = self.pictures.attention_masks[:, 0].transpose(0, 1)
        if settings.attention_target == "self_attention":
            self.targets = self._self_attention_targets()
        if settings.joint:
            names = [instance_name(region) for region in task.regions]
            self.check_fits([" and ".join(names)], "learner.joint needs all concepts in one prompt")

    def _self_attention_targets(self) -> Tensor:
        pixels, _ = look(self.backbone, self.task.image, "")
        height, width = pixels.shape[:2]
        places = latent_mask(torch.stack([region.mask for region in self.regions]), (height, width))
        maps = mean_self_attention(pixels, places)
        target = F.interpolate(maps.unsqueeze(1), size=self.grid, mode="area").squeeze(1)
        return torch.stack([target, target.flip(-1)]).to(self.backbone.device)

    def draw_tokens(self, step: int, tokens: Sequence[Sequence[str]]) -> list[str]:
        """One of each concept's tokens."""
        generator = seeded_generator(self.seed, "token", step)
        chosen = torch.randint(len(tokens[0]), (len(tokens),), generator=generator).tolist()
        return [own[k] for own, k in zip(tokens, chosen, strict=True)]

    def losses(self, step: int, concepts: Sequence[int], names: Sequence[str]) -> Iterator[Losses]:
        """Losses of some concepts, a prompt with one token each, chunk by chunk: their shares of a mean."""
        draw, count = self.draw(step, len(concepts)), len(concepts)
        for chunk in self.chunks(count):
            own, chosen = draw[chunk], [concepts[n] for n in chunk]
            latents, masks, _ = self.shown(chosen, own)
            prompts = [self.prompt(template, names[n]) for template, n in zip(own.templates, chunk, strict=True)]
            prediction, target = self.denoise(latents, own, prompts, look=self.look)
            reconstruction = self.masked_loss(prediction, target, masks).mean()
            words = prediction.attention.words[0].float()
            attention = torch.stack([self.attention(words[at], prompts[at], [names[n]]) for at, n in enumerate(chunk)])
            targets = self.targets[own.flipped, torch.tensor(chosen, device=own.flipped.device)]
            yield self._weighed(reconstruction, wasserstein_distance(targets, attention).mean(), len(chunk) / count)

    def joint_losses(self, step: int, names: Sequence[str], share: float = 1.0) -> Losses:
        """Losses of the prompt of all concepts, inside of the union of their masks; times ``share``."""
        draw = self.draw(step, 1, "joint")
        prompt, side = self.prompt(draw.templates[0], " and ".join(names)), int(draw.flipped[0])
        prediction, target = self.denoise(self.pictures.latents[:1, 0, side], draw, [prompt], look=self.look)
        union = self.pictures.masks[:, 0, side].amax(dim=0, keepdim=True)
        words = prediction.attention.words[0][0].float()
        attention = torch.stack([self.attention(words, prompt, [name]) for name in names])
        distance = wasserstein_distance(self.targets[side], attention).mean()
        return self._weighed(self.masked_loss(prediction, target, union).mean(), distance, share)

    def contrast(self, tokens: Sequence[Sequence[str]]) -> Iterator[Losses]:
        """The contrastive loss of the split tokens, if there is more than one a concept; the mean over the encoders."""
        if len(tokens[0]) > 1:
            each = [
                contrastive_loss(
                    torch.stack([torch.stack([self.tokens[name][encoder] for name in own]) for own in tokens]),
                    self.settings.temperature,
                )
                for encoder in self.backbone.rows
            ]
            loss = torch.stack(each).mean()
            yield {"contrastive": loss, "total": self.settings.contrastive_weight * loss}

    def _weighed(self, reconstruction: Tensor, attention: Tensor, share: float) -> Losses:
        total = reconstruction + self.settings.attention_weight * attention
        return {"reconstruction": reconstruction * share, "attention": attention * share, "total": total * share}
