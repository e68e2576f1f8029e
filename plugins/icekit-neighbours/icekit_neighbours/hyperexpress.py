"""HyperExpress (Shi et al., "Intrinsic Concept Extraction Based on Compositional Interpretability", CVPR 2026, arXiv
2603.11795): ICE's tokens, told apart, ordered and made composable in hyperbolic space.

There is no published code, and what follows is from the paper's abstract and from readers' notes on it, not from its
full text. They state:

- stage one, the masked denoising loss and the Wasserstein attention loss are ICE's;
- a text's embedding goes into the Poincare ball by v = exp_0(W E(text)), W learned;
- "HCL", a triplet loss by hyperbolic distance, first between object and attributes, then between attributes:
  max(0, d(anchor, object) - d(anchor, attribute) + gamma);
- "HEL", an object entails its attributes: max(0, cos omega(object) - cos theta(object, attribute)), omega half of the
  angle of the object's entailment cone, theta where the attribute lies;
- "HP", found on the anchors: the geodesic directions along which projections vary most (HoroPCA), and an orthogonal map
  onto a submanifold in which a whole is a weighted sum of its parts, R(i and j) = w_i R(i) + w_j R(j);
- L = L_recon + lambda_triplet L_triplet + lambda_attention L_attention + lambda_entail L_entail.

Our reading, where they leave it open: all numbers but ICE's; the phases; how HP acts on the tokens, which is as a loss
in a phase of its own, with R minus the Busemann values along HP's directions; and an instance token, which icekit asks
for and the paper does not have: it is the whole that the parts must add up to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from icekit.learning.hints import hinted_token
from icekit.learning.lesson import Draw, Lesson
from icekit.learning.rows import assign, flat, mean_token
from icekit.learning.training import Group, Losses, Task, TaskLearner
from icekit.learning.wasserstein import wasserstein_distance
from icekit.protocols import Backbone, Capability, Learned, token_names
from icekit_neighbours.hyperbolic import (
    aperture_sine,
    busemann,
    distance,
    exponential_map,
    exterior_cosine,
    midpoint,
    mobius_add,
    principal_directions,
)
from icekit_neighbours.settings import HyperExpressSettings

# --- The losses, on points of the ball -------------------------------------------------------------------------------


def object_triplet(anchors: Tensor, objects: Tensor, rivals: Tensor, margin: float) -> Tensor:
    """Keeps an object's token nearer to its word than its other tokens are.

        L = mean over concepts and rivals of max(0, d(anchor, object) - d(anchor, rival) + margin)

    Args:
        anchors: the words, points ``[C, D]``.
        objects: the category tokens, ``[C, D]``.
        rivals: the concepts' other tokens, ``[C, R, D]``.
        margin: in units of d.

    Returns:
        A scalar, at least zero.
    """
    own = distance(anchors, objects).unsqueeze(1)
    return torch.relu(own - distance(anchors.unsqueeze(1), rivals) + margin).mean()


def attribute_triplet(anchors: Tensor, tokens: Tensor, margin: float) -> Tensor:
    """Keeps an attribute's token nearer to its own anchor than the object's other attributes are.

        L = mean over concepts and ordered pairs j != k of max(0, d(a_j, t_j) - d(a_j, t_k) + margin)

    Args:
        anchors: the attributes' anchors ("colour"), points ``[A, D]``.
        tokens: ``[C, A, D]``, attributes in the same order.
        margin: in units of d.

    Returns:
        A scalar, at least zero; zero for one attribute, which has no rival.
    """
    count = len(anchors)
    distances = distance(anchors.unsqueeze(1), tokens.unsqueeze(1))  # [C, j, k]
    hinge = torch.relu(distances.diagonal(dim1=1, dim2=2).unsqueeze(2) - distances + margin)
    rivals = ~torch.eye(count, dtype=torch.bool, device=hinge.device)
    return (hinge * rivals).sum() / max(1, len(tokens) * count * (count - 1))


def contrastive_loss(anchors: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """InfoNCE by hyperbolic distance: of a concept's tokens, each anchor's own is to be the nearest to it.

        L = mean over concepts and j of -log(exp(-d(a_j, t_j) / T) / sum over k of exp(-d(a_j, t_k) / T))

    As in Ge et al., "Hyperbolic Contrastive Learning for Visual Representations beyond Objects", CVPR 2023.

    Args:
        anchors: points ``[C, J, D]``.
        tokens: ``[C, K, D]``, K at least J: the anchors' own in the same order, and then those that have no anchor.
        temperature: T, in units of d.

    Returns:
        A scalar, at least zero; zero for K = 1.
    """
    nearness = -distance(anchors.unsqueeze(2), tokens.unsqueeze(1)) / temperature  # [C, j, k]
    return -nearness.log_softmax(dim=2).diagonal(dim1=1, dim2=2).mean()


def entailment_loss(parents: Tensor, children: Tensor, k: float) -> Tensor:
    """Draws children into their parents' cones: mean of max(0, cos omega(parent) - cos theta(parent, child)).

    Angles, and so the loss, are the same in the ball and in the Lorentz model.

    Args:
        parents: points ``[..., D]``.
        children: ``[..., D]``, broadcast.
        k: K of ``aperture_sine``.

    Returns:
        A scalar in [0, 2]: zero where every child lies in its parent's cone.
    """
    omega = (1 - aperture_sine(parents, k).square()).sqrt()
    return torch.relu(omega - exterior_cosine(parents, children)).mean()


def composition_loss(wholes: Tensor, parts: Tensor, weights: Tensor) -> Tensor:
    """How far the weighted sum of a concept's parts is from the whole: mean of (R(whole) - sum_k w_k R(part_k))^2.

    It is what compositionality asks for (Stein et al., "Towards Compositionality in Concept Learning", ICML 2024).

    Args:
        wholes: R of the wholes, ``[C, n]``.
        parts: R of the parts, ``[C, K, n]``.
        weights: w, above zero, ``[C, K]``.

    Returns:
        A scalar, at least zero, in R's units squared.
    """
    return (wholes - (weights.unsqueeze(2) * parts).sum(dim=1)).square().mean()


# --- The learner -----------------------------------------------------------------------------------------------------


class HyperExpressLearner(TaskLearner[HyperExpressSettings]):
    """ICE's category, instance and attribute tokens, with losses in the Poincare ball instead of ICE's triplets.

        L = L_recon + attention_weight * L_attention + contrast_weight * L_contrast + entailment_weight * L_entailment

    Phase "object", prompts of "<instance> <category>": both are learned; the instance is the category's rival and is
    entailed by it. Phase "attributes", prompts of "<category> <attribute 1> ...": the attributes' tokens start from the
    instance (or from the region's hints, as the instance does then) and the category stays; it entails them, and all
    are told apart. Phase "compose" adds composition_weight * L_composition: along the directions in which the anchors
    differ most, category and attributes must add up to the whole, "<instance> <category>", each with a weight that is
    learned. W is learned in the first two phases, by all concepts together. With no attributes all steps are phase
    one's.
    """

    Settings = HyperExpressSettings
    needs: tuple[Capability, ...] = ("attention",)

    def teach(self, task: Task) -> Learned:
        """See ``TaskLearner``.

        Raises:
            InputError: tokens that do not fit into one prompt.
        """
        return Hierarchy(self.settings, self.backbone, task).run()


class Hierarchy(Lesson):
    """A lesson of each concept in its own mask, its tokens ordered in the ball. C concepts, A attributes.

    tangent_map: W ``[P, P]``, P a text embedding's size. log_weights: by category token ``[1 + A]``, the logarithms of
    what parts weigh in the whole, times 1 + A.
    """

    settings: HyperExpressSettings
    prefers_noise = True

    def __init__(self, settings: HyperExpressSettings, backbone: Backbone, task: Task) -> None:
        self.offset = settings.noise_offset
        self.names = [token_names(region, task.attributes) for region in task.regions]
        self.attributes = task.attributes
        self._hinted = [
            {one.name: token for one in task.attributes if (token := hinted_token(region, one, backbone)) is not None}
            for region in task.regions
        ]
        tokens: dict[str, dict[str, Tensor]] = {}
        for region, names, hinted in zip(task.regions, self.names, self._hinted, strict=True):
            tokens |= dict.fromkeys(names.values(), backbone.word_rows(region.word))
            if hinted:
                tokens[names["instance"]] = mean_token(list(hinted.values()))
        super().__init__(settings, backbone, task, tokens)
        self.check_fits(
            [phrase for i in range(len(self.names)) for phrase in (self.object_tokens(i), self.attribute_tokens(i))],
            f"one prompt must hold a concept's category and all of its attributes, here {len(self.attributes)}",
        )
        with torch.no_grad():
            self.words = backbone.embed_texts([region.word for region in task.regions]).float()  # [C, P]
            if task.attributes:
                self.anchors = backbone.embed_texts([one.anchor for one in task.attributes]).float()  # [A, P]
        start = settings.map_scale * torch.eye(self.words.shape[1], device=backbone.device)
        self.tangent_map = nn.Parameter(start, requires_grad=False)
        self.log_weights = {
            names["category"]: nn.Parameter(
                torch.zeros(1 + len(task.attributes), device=backbone.device), requires_grad=False
            )
            for names in self.names
        }

    def run(self) -> Learned:
        """All phases, from where the checkpoint stands."""
        steps, first = self.settings.steps, (self.settings.steps + 1) // 2
        compose = min(round(self.settings.compose_share * steps), steps - first)
        if not self.attributes:
            first, compose = steps, 0
        trainer, count = self.trainer(steps), len(self.regions)
        trainer.keep({"tangent": self.tangent_map}, "map")
        trainer.keep(self.log_weights, "weights")

        rate = self.settings.map_learning_rate
        shared = [Group({"tangent-map": self.tangent_map}, rate, "map_learning_rate")] if rate else []
        groups = [self._group(names, ["category", "instance"]) for names in self.names]
        trainer.train("object", groups + shared, range(1, first + 1), self.object_losses, loss_scale=count)
        if self.attributes:
            if trainer.done == first:
                self._start_attributes()
            groups = [self._group(names, [one.name for one in self.attributes]) for names in self.names]
            last = steps - compose
            trainer.train(
                "attributes", groups + shared, range(first + 1, last + 1), self.attribute_losses, loss_scale=count
            )
            if compose and trainer.done < steps:
                composer = Composer(self)
                groups += [
                    Group({f"{name}-weights": weights}, self.settings.composition_learning_rate)
                    for name, weights in self.log_weights.items()
                ]
                trainer.train(
                    "compose",
                    groups,
                    range(last + 1, steps + 1),
                    lambda step: self.attribute_losses(step, composer),
                    loss_scale=count,
                )
        return self.learned()

    def object_losses(self, step: int) -> Iterator[Losses]:
        """Phase one's losses of one step, chunk by chunk."""
        draw = self.draw(step)
        for chunk in self.chunks(len(self.regions)):
            losses = self._denoising_losses(draw, chunk, [self.object_tokens(place) for place in chunk])
            tokens = self._points([[self.names[place][kind] for kind in ("category", "instance")] for place in chunk])
            words = self.to_ball(self.words[chunk])
            if self.settings.contrast == "triplet":
                losses["triplet"] = object_triplet(words, tokens[:, 0], tokens[:, 1:], self.settings.margin)
            else:
                losses["infonce"] = contrastive_loss(words.unsqueeze(1), tokens, self.settings.temperature)
            losses["entailment"] = entailment_loss(tokens[:, 0], tokens[:, 1], self.settings.aperture)
            yield self._total(losses, len(chunk))

    def attribute_losses(self, step: int, composer: Composer | None = None) -> Iterator[Losses]:
        """Phase two's losses of one step, chunk by chunk; phase three's with a composer."""
        settings, draw = self.settings, self.draw(step)
        for chunk in self.chunks(len(self.regions)):
            losses = self._denoising_losses(draw, chunk, [self.attribute_tokens(place) for place in chunk])
            slots = ["category", *(one.name for one in self.attributes)]
            tokens = self._points([[self.names[place][slot] for slot in slots] for place in chunk])
            words, anchors = self.to_ball(self.words[chunk]), self.to_ball(self.anchors)
            if settings.contrast == "triplet":
                losses["triplet"] = object_triplet(
                    words, tokens[:, 0], tokens[:, 1:], settings.margin
                ) + attribute_triplet(anchors, tokens[:, 1:], settings.margin)
            else:
                own = torch.cat([words.unsqueeze(1), anchors.expand(len(chunk), -1, -1)], dim=1)
                losses["infonce"] = contrastive_loss(own, tokens, settings.temperature)
            losses["entailment"] = entailment_loss(tokens[:, :1], tokens[:, 1:], settings.aperture)
            if settings.anchors_entail:
                losses["entailment"] = losses["entailment"] + entailment_loss(anchors, tokens[:, 1:], settings.aperture)
            if composer is not None:
                names = [self.names[place]["category"] for place in chunk]
                weights = torch.stack([self.log_weights[name] for name in names]).exp() / tokens.shape[1]
                losses["composition"] = composition_loss(composer.wholes[chunk], composer.represent(tokens), weights)
            yield self._total(losses, len(chunk))

    def _denoising_losses(self, draw: Draw, chunk: list[int], phrases: list[str]) -> Losses:
        """L_recon and L_attention, means over the chunk; the map of a prompt is the mean over its tokens' maps."""
        own = draw[chunk]
        latents, masks, attention_masks = self.shown(chunk, own)
        prompts = [self.prompt(template, phrase) for template, phrase in zip(own.templates, phrases, strict=True)]
        prediction, target = self.denoise(latents, own, prompts, look=self.look)
        attention = torch.stack(
            [
                torch.stack([self.attention(maps, prompt, [token]) for token in phrase.split()]).mean(dim=0)
                for maps, prompt, phrase in zip(prediction.attention.words[0].float(), prompts, phrases, strict=True)
            ]
        )
        return {
            "reconstruction": self.masked_loss(prediction, target, masks).mean(),
            "attention": wasserstein_distance(attention_masks, attention).mean(),
        }

    def _total(self, losses: Losses, concepts: int) -> Losses:
        """Adds ``total``; all of them become the chunk's share of a mean over all concepts."""
        settings = self.settings
        total = (
            losses["reconstruction"]
            + settings.attention_weight * losses["attention"]
            + settings.contrast_weight * losses[settings.contrast]
            + settings.entailment_weight * losses["entailment"]
        )
        if "composition" in losses:
            total = total + settings.composition_weight * losses["composition"]
        return {name: loss * (concepts / len(self.regions)) for name, loss in (losses | {"total": total}).items()}

    def to_ball(self, pooled: Tensor) -> Tensor:
        """exp_0(W E): embeddings of texts ``[..., P]`` as points of the ball."""
        return exponential_map(pooled @ self.tangent_map.T)

    def _points(self, texts: list[list[str]]) -> Tensor:
        """As many texts for each concept, in the ball: ``[B, T, P]``."""
        pooled = self.backbone.embed_texts([text for own in texts for text in own], self.tokens).float()
        return self.to_ball(pooled.unflatten(0, (len(texts), -1)))

    def object_tokens(self, place: int) -> str:
        """``<instance> <category>``."""
        return f"{self.names[place]['instance']} {self.names[place]['category']}"

    def attribute_tokens(self, place: int) -> str:
        """``<category> <attribute 1> ...``."""
        names = self.names[place]
        return " ".join([names["category"], *(names[one.name] for one in self.attributes)])

    def _group(self, names: Mapping[str, str], kinds: Sequence[str]) -> Group:
        """Some of one concept's tokens: it learns as if it were alone."""
        return Group(flat(self.tokens, [names[kind] for kind in kinds]), self.settings.learning_rate)

    def _start_attributes(self) -> None:
        """From what the retriever saw, or else from the learned instance."""
        for names, hinted in zip(self.names, self._hinted, strict=True):
            for one in self.attributes:
                assign(self.tokens[names[one.name]], hinted.get(one.name, self.tokens[names["instance"]]))


class Composer:
    """HP: what the embeddings are like along the directions in which the anchors differ most. W stays from here on.

    The anchors are the regions' words, the attributes' anchors and the words of their vocabularies; their midpoint is
    moved to the centre, as HoroPCA does.

    directions: the ideal points, ``[P, n]``. centre: ``[P]``. spread: R's unit, the root mean square of the anchors'.
    wholes: R of "<instance> <category>", ``[C, n]``.
    """

    def __init__(self, hierarchy: Hierarchy) -> None:
        backbone = hierarchy.backbone
        texts = [region.word for region in hierarchy.regions]
        for one in hierarchy.attributes:
            texts += [one.anchor, *(word for word in one.vocabulary if backbone.knows(word))]
        with torch.no_grad():
            anchors = hierarchy.to_ball(backbone.embed_texts(list(dict.fromkeys(texts))).float())
            self.centre = midpoint(anchors)
            count = min(hierarchy.settings.directions, len(anchors) - 1, anchors.shape[1])
            found = principal_directions(mobius_add(-self.centre, anchors), count)
            self.directions, self.spread = found.to(anchors), torch.ones((), device=anchors.device)
            self.spread = self.represent(anchors).square().mean().sqrt()
            wholes = [hierarchy.object_tokens(place) for place in range(len(hierarchy.regions))]
            self.wholes = self.represent(hierarchy.to_ball(backbone.embed_texts(wholes, hierarchy.tokens).float()))

    def represent(self, points: Tensor) -> Tensor:
        """R: how far points ``[..., P]`` are towards each direction, minus their Busemann values: ``[..., n]``.

        These n numbers are all that the horospherical projection keeps of a point, and vectors of them can be added.
        They are in units of the anchors' spread, so that W's size does not matter.
        """
        return -busemann(mobius_add(-self.centre, points), self.directions) / self.spread
