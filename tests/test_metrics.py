"""The built-in metrics, against values worked out by hand."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from icekit import InputError, Region
from icekit.builtin.metrics import attributes, image_encoders, mask_metrics, similarity
from icekit.builtin.metrics.image_encoders import ImageEncoder
from icekit.protocols import BenchImage, Column, FoundConcept, Match, TrueConcept
from icekit.protocols.measuring import columns_of
from icekit.testing import tiny

CPU = SimpleNamespace(device=torch.device("cpu"))


def mask(*cells: int) -> torch.Tensor:
    flat = torch.zeros(16, dtype=torch.bool)
    flat[list(cells)] = True
    return flat.view(4, 4)


def concept(index: int, word: str) -> FoundConcept:
    tokens = {"category": f"<{word}-{index}>", "instance": f"<{word}-{index}-instance>"}
    return FoundConcept(Region(index, word, 1.0, mask(index)), tokens, {})


@dataclass
class FakeOutcome:
    """An outcome whose generated images are given."""

    image: BenchImage
    found: list[FoundConcept] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)
    attributes: tuple[str, ...] = ()
    pictures: dict[str, list[Image.Image]] = field(default_factory=dict)
    vocabularies: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def generate(self, prompt: str) -> list[Image.Image]:
        return self.pictures[prompt]


BLANK = BenchImage("blank", torch.zeros(3, 4, 4))


def test_masks_and_words() -> None:
    cup, ball, vase, bowl = (TrueConcept(mask(i), word) for i, word in enumerate(("cup", "ball", "vase", "bowl")))
    outcome = FakeOutcome(
        BLANK,
        matches=[
            Match(cup.mask, cup, concept(0, "Cup"), 0.8),
            Match(ball.mask, ball, concept(1, "vase"), 0.5),
            Match(vase.mask, vase, concept(2, "vase"), 0.3),
            Match(bowl.mask, bowl, None, 0.0),
        ],
    )

    def value(metric: type) -> Any:
        [score] = metric(metric.Settings(), CPU).measure(outcome).values()
        return score.value

    assert value(mask_metrics.MeanIou) == pytest.approx((0.8 + 0.5 + 0.3 + 0) / 4)
    assert value(mask_metrics.Recall) == 2 / 4  # 0.5 is enough
    assert value(mask_metrics.WordAccuracy) == 1 / 4  # the ball is called vase, the vase has too little overlap
    assert mask_metrics.MeanIou(mask_metrics.MeanIou.Settings(), CPU).measure(FakeOutcome(BLANK))["miou"].value is None


def test_pixels_of_masks() -> None:
    true = TrueConcept(mask(0, 1, 2, 3), "cup")
    found = FoundConcept(Region(0, "cup", 1.0, mask(2, 3, 4, 5, 6)), {}, {})
    outcome = FakeOutcome(BLANK, matches=[Match(true.mask, true, found, 2 / 7), Match(true.mask, true, None, 0.0)])
    settings = mask_metrics.MeanIou.Settings()
    [recall] = mask_metrics.MaskRecall(settings, CPU).measure(outcome).values()
    [precision] = mask_metrics.MaskPrecision(settings, CPU).measure(outcome).values()
    assert recall.value == pytest.approx((2 / 4 + 0) / 2)
    assert precision.value == pytest.approx((2 / 5 + 0) / 2)


def test_columns_of_every_attribute() -> None:
    columns = {"plain": Column("x"), "of_{attribute}": Column("{attribute} tokens", higher_is_better=False)}
    assert columns_of(columns, ["colour", "shine"]) == {
        "plain": Column("x"),
        "of_colour": Column("colour tokens", higher_is_better=False),
        "of_shine": Column("shine tokens", higher_is_better=False),
    }
    assert list(columns_of(columns, [])) == ["plain"]


def test_word_ranked_first_by_hand() -> None:
    words = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    images = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8]])
    # Similarities: (1, 0, .6), (.8, .6, .96), (0, 1, .8), (.6, .8, 1).
    assert attributes.share_ranked_first(images, words, own=0) == 1 / 4
    assert attributes.share_ranked_first(images, words, own=1) == 1 / 4
    assert attributes.share_ranked_first(images, words, own=2) == 2 / 4
    twins = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert attributes.share_ranked_first(images[:1], twins, own=1) == 1  # none is nearer


class FakeClip:
    """Colours are seen as they are; "red cup" is the colour red."""

    def embed_words(self, phrases: list[str], templates: tuple[str, ...]) -> torch.Tensor:
        self.asked = [template.format(phrase) for template in templates for phrase in phrases]
        colours = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}
        return torch.tensor([colours[phrase.split()[0]] for phrase in phrases])


def test_what_images_of_an_attribute_show(outcome: FakeOutcome, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = FakeClip()
    monkeypatch.setattr(image_encoders, "clip_model", lambda *arguments: clip)
    cup, ball = outcome.found
    cup = dataclasses.replace(cup, tokens=cup.tokens | {"colour": "<cup-0-colour>"}, words={"colour": ["red", "blue"]})
    ball = dataclasses.replace(ball, tokens={"colour": "<ball-1-colour>"}, words={"colour": ["green"]})
    outcome.matches = [
        dataclasses.replace(outcome.matches[0], found=cup),
        dataclasses.replace(outcome.matches[1], found=ball),
    ]
    outcome.attributes, outcome.vocabularies = ("colour",), {"colour": ("red", "green", "blue")}
    outcome.pictures |= {
        "a photo of a <cup-0> <cup-0-colour>": [paint(RED), paint(GREEN)],
        "a photo of a ball <ball-1-colour>": [paint(GREEN), paint(GREEN)],  # the category has no token
        "a photo of a red cup": [paint(RED), paint(RED)],
        "a photo of a green ball": [paint(GREEN), paint(RED)],
    }
    built = attributes.AttributeClip(attributes.AttributeClip.Settings(), CPU)
    built.prepare([outcome.image])
    scores = built.measure(outcome)
    assert {name: score.value for name, score in scores.items()} == {
        "clip_colour": (0.5 + 1) / 2,
        "clip_colour_word": (1 + 0.5) / 2,
    }
    assert scores["clip_colour"].prompts == ["a photo of a <cup-0> <cup-0-colour>", "a photo of a ball <ball-1-colour>"]
    assert clip.asked == ["a photo of a red ball", "a photo of a green ball", "a photo of a blue ball"]
    outcome.matches = [Match(outcome.matches[0].mask, None, None, 0.0)]
    assert built.measure(outcome)["clip_colour"].value is None
    with pytest.raises(ValueError, match=r"has no single \{\} for the word"):
        attributes.AttributeClip.Settings(templates=("a photo",))


def test_accuracy_by_hand() -> None:
    prototypes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    generated = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    # Similarities: (1, 0, .6), (.8, .6, .96), (0, 1, .8). The first prototype is nearest for the first image, second
    # nearest for the second, third nearest for the third.
    apart = [0, 1, 2]
    assert similarity.share_within_nearest(generated, prototypes, apart, own=0, k=1) == pytest.approx(1 / 3)
    assert similarity.share_within_nearest(generated, prototypes, apart, own=0, k=2) == pytest.approx(2 / 3)
    assert similarity.share_within_nearest(generated, prototypes, apart, own=0, k=3) == 1
    # The first and the last show the same concept: then it is the nearest one for the second image, too.
    twins = [0, 1, 0]
    assert similarity.share_within_nearest(generated, prototypes, twins, own=0, k=1) == pytest.approx(2 / 3)
    assert similarity.share_within_nearest(generated, prototypes, twins, own=0, k=2) == 1
    assert similarity.mean_cosine(generated, prototypes[0]) == pytest.approx((1 + 0.8 + 0) / 3)


def mean_colour(images: torch.Tensor) -> torch.Tensor:
    return images.mean(dim=(2, 3))


def paint(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (4, 4), colour)


RED, GREEN = (255, 0, 0), (0, 255, 0)


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch) -> FakeOutcome:
    """Left half red, right half green; both found, the red one drawn red and green, the green one green."""
    monkeypatch.setattr(image_encoders, "clip_encoder", lambda *arguments: ImageEncoder(mean_colour))
    pixels = torch.zeros(3, 4, 4)
    pixels[0, :, :2] = pixels[1, :, 2:] = 1
    left = torch.zeros(4, 4, dtype=torch.bool)
    left[:, :2] = True
    truth = (TrueConcept(left, "cup"), TrueConcept(~left, "ball"))
    found = [concept(0, "cup"), concept(1, "ball")]
    return FakeOutcome(
        BenchImage("halves", pixels, truth),
        found,
        [Match(true.mask, true, one, 1.0) for true, one in zip(truth, found, strict=True)],
        pictures={
            "a photo of a <cup-0-instance> <cup-0>": [paint(RED), paint(GREEN)],
            "a photo of a <ball-1-instance> <ball-1>": [paint(GREEN), paint(GREEN)],
            "a photo of a <cup-0-instance> <cup-0> and a <ball-1-instance> <ball-1>": [paint(RED)],
        },
    )


def measure(metric: type, outcome: FakeOutcome) -> float | None:
    built = metric(metric.Settings(), CPU)
    built.prepare([outcome.image])
    [score] = built.measure(outcome).values()
    return score.value


def test_similarities(outcome: FakeOutcome) -> None:
    # Masked to the cup the image is red on black: cosine 1 with red, 0 with green.
    assert measure(similarity.Identity, outcome) == pytest.approx((0.5 + 1) / 2)
    assert measure(similarity.Composition, outcome) == pytest.approx(1 / 2**0.5)  # red with half red, half green
    assert measure(similarity.Accuracy, outcome) == pytest.approx((0.5 + 1) / 2)
    assert measure(similarity.Accuracy3, outcome) == 1


def test_prompted_with_category_and_attributes(outcome: FakeOutcome) -> None:
    """As ICE's published figures were; where a learner makes no attribute tokens, with what it makes."""
    cup, ball = outcome.found
    coloured = dataclasses.replace(
        cup, tokens=cup.tokens | {"colour": "<cup-0-colour>", "material": "<cup-0-material>"}
    )
    assert similarity.object_phrase(coloured, "attributes") == "a <cup-0> <cup-0-colour> <cup-0-material>"
    assert similarity.object_phrase(coloured) == "a <cup-0-instance> <cup-0>"
    assert similarity.object_phrase(ball, "attributes") == "a <ball-1-instance> <ball-1>"

    outcome.found = [coloured, ball]
    outcome.matches = [dataclasses.replace(outcome.matches[0], found=coloured), outcome.matches[1]]
    attributes = "a <cup-0> <cup-0-colour> <cup-0-material>"
    outcome.pictures[f"a photo of {attributes}"] = [paint(RED), paint(RED)]
    outcome.pictures[f"a photo of {attributes} and a <ball-1-instance> <ball-1>"] = [paint(RED)]
    for metric, value in ((similarity.Identity, 1.0), (similarity.Composition, 1 / 2**0.5), (similarity.Accuracy, 1.0)):
        built = metric(metric.Settings(prompt="attributes"), CPU)
        built.prepare([outcome.image])
        [score] = built.measure(outcome).values()
        assert score.value == pytest.approx(value)
        assert score.prompts[0].startswith(f"a photo of {attributes}")


def test_objects_that_look_the_same_are_one_concept(outcome: FakeOutcome) -> None:
    # A second image, green: its cup is nearer to green images than the first image's red one.
    green = BenchImage("green", torch.zeros(3, 4, 4).index_fill(0, torch.tensor(1), 1), ())
    built = similarity.Accuracy(similarity.Accuracy.Settings(), CPU)

    def accuracy(attributes: dict[str, str], other: dict[str, str]) -> float | None:
        cup, ball = outcome.image.concepts
        first = dataclasses.replace(outcome.image, concepts=(dataclasses.replace(cup, attributes=attributes), ball))
        second = dataclasses.replace(green, concepts=(TrueConcept(cup.mask, "cup", other),))
        built.prepare([first, second])
        return built.measure(outcome)["acc1"].value

    assert accuracy({}, {}) == pytest.approx((0.5 + 1) / 2)  # nothing is known of how they look
    assert accuracy({"colour": "red"}, {"colour": "green"}) == pytest.approx((0.5 + 1) / 2)
    assert accuracy({"colour": "red"}, {"colour": "red"}) == 1  # a green image is as near to the cup as to the ball


def test_what_was_not_found(outcome: FakeOutcome) -> None:
    [first, second] = outcome.matches
    outcome.matches = [first, Match(second.mask, second.true, None, 0.0)]
    assert measure(similarity.Identity, outcome) == pytest.approx(0.5)  # left out
    assert measure(similarity.Accuracy, outcome) == pytest.approx((0.5 + 0) / 2)  # wrong
    outcome.matches, outcome.found = [], []
    assert measure(similarity.Identity, outcome) is None
    assert measure(similarity.Composition, outcome) is None


def test_a_prompt_that_is_too_long(outcome: FakeOutcome, monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(prompt: str) -> list[Image.Image]:
        if "and" in prompt:
            raise InputError("prompt too long")
        return outcome.pictures[prompt]

    monkeypatch.setattr(outcome, "generate", generate, raising=False)
    [score] = similarity.Composition(similarity.ClipSettings(), CPU).measure(outcome).values()
    assert score.prompts == ("a photo of a <cup-0-instance> <cup-0>",)


def test_background() -> None:
    image = torch.tensor([0.2, 0.4, 0.6, 0.9]).expand(3, 1, 4).clone()
    kept = torch.tensor([[True, False, False, False]])
    assert similarity.masked(image, kept, "black")[0, 0].tolist() == pytest.approx([0.2, 0, 0, 0])
    mean = (0.4 + 0.6 + 0.9) / 3
    assert similarity.masked(image, kept, "mean")[0, 0].tolist() == pytest.approx([0.2, mean, mean, mean])


def test_encoder_encodes_a_picture_once() -> None:
    seen: list[int] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return mean_colour(images)

    encoder = ImageEncoder(encode)
    pictures = [torch.full((3, 2, 2), value) for value in (0.1, 0.5, 0.1)]
    first = encoder.embed(pictures)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(encoder.embed(pictures[:2]), first[:2])
    assert sum(seen) == 2


def test_clip_folder(clip_folder: Path) -> None:
    settings = similarity.ClipSettings(clip=f"local-dir:{clip_folder}")
    embedded = settings.encoder(torch.device("cpu")).embed([torch.rand(3, 32, 32), torch.rand(3, 80, 80)][:1])
    assert embedded.shape[0] == 1
    with pytest.raises(InputError, match=r"^metric.clip: no such folder: local-dir:nowhere$"):
        image_encoders.clip_encoder("local-dir:nowhere", "", torch.device("cpu"))


def test_dino_folder(tmp_path: Path) -> None:
    from transformers import ViTModel

    tiny.write_dino(tmp_path)
    model = ViTModel.from_pretrained(tmp_path).eval()
    picture = torch.rand(3, 32, 32)
    embedded = similarity.DinoSettings(dino=str(tmp_path)).encoder(torch.device("cpu")).embed([picture])
    with torch.no_grad():
        expected = model((picture[None] - 0.5) / 0.5).last_hidden_state[:, 0]  # the processor's mean and deviation
    torch.testing.assert_close(embedded, torch.nn.functional.normalize(expected, dim=-1), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match=r"^metric.dino: .*nowhere is no vision transformer"):
        image_encoders.dino_encoder(str(tmp_path / "nowhere"), torch.device("cpu"))
