"""ICE's losses on offsets of the modulation: the words stay, and what they stand for is learned.

FLUX.1 hears little of T5's rows, and of CLIP's its modulation alone; what steers a word there is an offset of the
modulation at its positions (``modulation``). So a token is a plain word's rows, which stay, and an offset, which is
learned as ICE learns rows: by the masked denoising loss and by its triplets, held in the space of the modulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from icekit.learning.hints import hinted_token
from icekit.learning.lesson import Lesson
from icekit.learning.rows import flat
from icekit.learning.training import Group, Losses, Task, TaskLearner
from icekit.learning.triplet import intrinsic_triplet, object_triplet
from icekit.learning.wasserstein import wasserstein_distance
from icekit.protocols import Backbone, Capability, InputError, Learned, Look, Tokens, token_names
from icekit_dit.modulation import MODULATION
from icekit_dit.modulation_settings import ModulationSettings


class ModulationLearner(TaskLearner[ModulationSettings]):
    """Offsets of the modulation for a category, an instance and one token an attribute, by ICE's losses and phases."""

    Settings = ModulationSettings

    def __init__(self, settings: ModulationSettings, backbone: Backbone) -> None:
        """On a backbone whose tokens have an offset.

        Raises:
            InputError: they have none.
        """
        super().__init__(settings, backbone)
        if MODULATION not in backbone.rows:
            raise InputError(
                f"learner 'modulation' learns offsets, and this backbone's tokens have rows for "
                f"{', '.join(backbone.rows)} alone: with a model of {' or '.join(settings.backbones)} take --backbone "
                f"{' or '.join(settings.backbones.values())}, with another one another learner"
            )

    @staticmethod
    def needs_with(settings: ModulationSettings) -> list[Capability]:
        """What the backbone must be able to do."""
        return ["attention"] if settings.attention_weight else []

    def teach(self, task: Task) -> Learned:
        """See ``TaskLearner``."""
        return ModulationLesson(self.settings, self.backbone, task).run()


class ModulationLesson(Lesson):
    """One call of ``ModulationLearner.learn``. C concepts, A attributes.

    word_points: the regions' words, ``[C, D]``. slot_points: with the attributes' own, ``[C, 1 + A, D]``.
    """

    settings: ModulationSettings
    prefers_noise = True

    def __init__(self, settings: ModulationSettings, backbone: Backbone, task: Task) -> None:
        self.attributes = task.attributes
        self.names = [token_names(region, task.attributes) for region in task.regions]
        tokens: dict[str, dict[str, Tensor]] = {}
        for region, names in zip(task.regions, self.names, strict=True):
            word = backbone.word_rows(region.word)
            tokens |= {names["category"]: word, names["instance"]: word}
            for attribute in task.attributes:
                seen = hinted_token(region, attribute, backbone, likeliest=True)
                tokens[names[attribute.name]] = backbone.word_rows(attribute.anchor) if seen is None else seen
        super().__init__(settings, backbone, task, tokens)
        self.object_steps = (settings.steps + 1) // 2 if self.attributes else settings.steps
        phrases = [phrase for place in range(len(self.names)) for phrase in self._phrases(place)]
        self.check_fits(phrases, f"{len(self.attributes)} attributes are too many, a concept's must fit into a prompt")
        with torch.no_grad():
            self.word_points = self._points([region.word for region in self.regions])
            anchors = [attribute.anchor for attribute in self.attributes]
            more = [self._points(anchors).expand(len(self.regions), -1, -1)] if anchors else []
            self.slot_points = torch.cat([self.word_points.unsqueeze(1), *more], dim=1)

    def run(self) -> Learned:
        """Both phases, from where the checkpoint stands."""
        settings, trainer = self.settings, self.trainer(self.settings.steps)
        steps = range(1, self.object_steps + 1)
        trainer.train(
            "object", self._groups(["category", "instance"]), steps, self.object_losses, float(len(self.regions))
        )
        if self.attributes:
            with torch.no_grad():
                self._category_points = self._points([names["category"] for names in self.names])
            steps = range(self.object_steps + 1, settings.steps + 1)
            parts = [attribute.name for attribute in self.attributes]
            trainer.train("attributes", self._groups(parts), steps, self.attribute_losses, float(len(self.regions)))
        return self.learned()

    def _groups(self, parts: Sequence[str]) -> list[Group]:
        """Each concept's offsets of these parts: it learns as if it were alone."""
        groups = []
        for names in self.names:
            rows = flat(self.tokens, [names[part] for part in parts])
            offsets = {name: row for name, row in rows.items() if name.endswith(f"/{MODULATION}")}
            groups.append(Group(offsets, self.settings.learning_rate))
        return groups

    def _phrases(self, concept: int) -> tuple[str, str]:
        """A concept's tokens in phase one, and in phase two."""
        names = self.names[concept]
        attributes = [names[attribute.name] for attribute in self.attributes]
        return f"{names['instance']} {names['category']}", " ".join([names["category"], *attributes])

    def _points(self, texts: list[str], tokens: Tokens | None = None) -> Tensor:
        """Texts in the space of the modulation, ``[B, D]`` of length one."""
        return self.backbone.embed_texts(texts, self.tokens if tokens is None else tokens, MODULATION).float()

    def object_losses(self, step: int) -> Iterator[Losses]:
        """Phase one's losses of one step."""

        def triplet(chunk: list[int]) -> Tensor:
            words = [self.names[place][part] for place in chunk for part in ("category", "instance")]
            points = self._points(words).unflatten(0, (len(chunk), -1))
            margin = self.settings.object_margin
            return object_triplet(self.word_points[chunk], points[:, 0], points[:, 1], margin)

        yield from self._losses(step, 0, triplet, self.settings.object_triplet_weight)

    def attribute_losses(self, step: int) -> Iterator[Losses]:
        """Phase two's losses of one step."""

        def triplet(chunk: list[int]) -> Tensor:
            words = [self.names[place][attribute.name] for place in chunk for attribute in self.attributes]
            points = self._points(words).unflatten(0, (len(chunk), -1))
            slots = torch.cat([self._category_points[chunk].unsqueeze(1), points], dim=1)
            settings = self.settings
            return intrinsic_triplet(self.slot_points[chunk], slots, settings.intrinsic_margin, settings.intrinsic_form)

        yield from self._losses(step, 1, triplet, self.settings.intrinsic_triplet_weight)

    def _losses(
        self, step: int, phase: int, triplet: Callable[[list[int]], Tensor], triplet_weight: float
    ) -> Iterator[Losses]:
        """One step's losses, chunk by chunk, each its share of the mean over the concepts."""
        settings, draw, count = self.settings, self.draw(step), len(self.regions)
        look = self.look if settings.attention_weight else Look()
        for chunk in self.chunks(count):
            own = draw[chunk]
            latents, masks, attention_masks = self.shown(chunk, own)
            phrases = [self._phrases(place)[phase] for place in chunk]
            prompts = [self.prompt(template, phrase) for template, phrase in zip(own.templates, phrases, strict=True)]
            prediction, target = self.denoise(latents, own, prompts, look=look)
            losses = {"reconstruction": self.masked_loss(prediction, target, masks).mean(), "triplet": triplet(chunk)}
            total = losses["reconstruction"] + triplet_weight * losses["triplet"]
            if settings.attention_weight:
                maps = prediction.attention.words[0].float()
                each = zip(maps, prompts, phrases, strict=True)
                attention = torch.stack([self.attention(one, prompt, phrase.split()) for one, prompt, phrase in each])
                losses["attention"] = wasserstein_distance(attention_masks, attention).mean()
                total = total + settings.attention_weight * losses["attention"]
            share = len(chunk) / count
            yield {name: loss * share for name, loss in (losses | {"total": total}).items()}
