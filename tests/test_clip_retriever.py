"""The retriever: on a tiny CLIP of random weights, and on planted embeddings where the right words are known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.functional import to_tensor

from icekit import clip
from icekit.builtin.retrievers.clip import ClipRetriever
from icekit.clip import visible_window
from icekit.protocols import InputError, View
from icekit.words import read_vocabulary

BACKBONE: Any = SimpleNamespace(device=torch.device("cpu"), knows=lambda word: word != "zyx")
WORDS = ("cup", "ball", "cube", "bowl", "bottle", "vase")


def everything(pixels: torch.Tensor) -> View:
    return View(pixels, pixels, torch.ones(pixels.shape[1:], dtype=torch.bool))


def noise(side: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))


def retriever(folder: Path | str, **settings: Any) -> ClipRetriever:
    values = {"model": str(folder), "vocabulary": WORDS, "background": (), "max_similarity": 1.0} | settings
    return ClipRetriever(ClipRetriever.Settings.model_validate(values), BACKBONE)


class PlantedClip:
    """A CLIP whose image embedding is the image's mean colour, and whose texts embed as planted."""

    logit_scale = torch.tensor(2.0).log()
    TEXTS: ClassVar = {"red": (1.0, 0, 0), "crimson": (0.95, 0.05, 0), "green": (0, 1.0, 0), "wall": (0.6, 0.6, 0.6)}

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3))

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([next(v for k, v in self.TEXTS.items() if k in text) for text in texts])


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PlantedClip()
    monkeypatch.setattr(clip, "load_clip", lambda *_: (model, model.tokenize))
    monkeypatch.setattr(clip, "preprocess", lambda image, model: F.interpolate(image[None], size=(8, 8))[0])


def test_scores_are_those_of_open_clip(clip_folder: Path) -> None:
    template = "a photo of a {}"
    found = retriever(clip_folder, templates=template, top=10).retrieve(everything(noise()), [])

    name = f"local-dir:{clip_folder}"
    model, preprocess = open_clip.create_model_from_pretrained(name)
    model.eval()
    picture = Image.fromarray((noise() * 255).byte().permute(1, 2, 0).numpy())
    with torch.no_grad():
        image = model.encode_image(preprocess(picture)[None], normalize=True)
        texts = model.encode_text(
            open_clip.get_tokenizer(name)([template.format(word) for word in WORDS]), normalize=True
        )
    expected = dict(zip(WORDS, (texts @ image[0]).tolist(), strict=True))
    assert [candidate.word for candidate in found] == sorted(expected, key=lambda word: -expected[word])
    for candidate in found:  # Pillow's and torchvision's bicubic differ a little, and the picture was rounded to 8 bits
        assert candidate.score == pytest.approx(expected[candidate.word], abs=2e-2)


def test_preprocessing_is_the_models_own(clip_folder: Path) -> None:
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")
    picture = Image.effect_mandelbrot((128, 128), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    ours = clip.preprocess(to_tensor(picture), model)
    assert ours.shape == (3, 64, 64)
    difference = (ours - preprocess(picture)).abs()  # Pillow rounds to 1/255, which is 0.015 in the model's units
    assert difference.max() < 0.1 and difference.mean() < 0.01


def test_a_plain_folder_and_local_dir_are_the_same(clip_folder: Path) -> None:
    view = everything(noise())
    assert retriever(clip_folder).retrieve(view, []) == retriever(f"local-dir:{clip_folder}").retrieve(view, [])


def test_top_and_used(clip_folder: Path) -> None:
    view, found = everything(noise()), retriever(clip_folder, top=3)
    first = found.retrieve(view, [])
    assert len(first) == 3
    assert first[0].word not in [candidate.word for candidate in found.retrieve(view, [first[0].word.upper()])]
    assert found.retrieve(view, list(WORDS)) == []


def test_similarity_is_a_cosine(clip_folder: Path) -> None:
    found = retriever(clip_folder)
    assert found.similarity("cup", "cup") == pytest.approx(1)
    assert found.similarity("cup", "teapot") == pytest.approx(found.similarity("teapot", "cup"))


@pytest.mark.usefixtures("planted")
def test_words_too_similar_to_an_earlier_one_are_dropped() -> None:
    found = retriever("x", vocabulary=("red", "crimson", "green"), max_similarity=0.85)
    red = everything(torch.tensor([1.0, 0.1, 0]).view(3, 1, 1).expand(3, 8, 8))
    assert [candidate.word for candidate in found.retrieve(red, [])] == ["crimson", "red", "green"]
    assert [candidate.word for candidate in found.retrieve(red, ["red"])] == ["green"]


@pytest.mark.usefixtures("planted")
def test_what_is_seen_is_described_at_the_models_own_temperature() -> None:
    """Softmax of 2 x cosine: "red" 1, "green" 0, "wall" 1 / sqrt(3)."""
    seen = retriever("", vocabulary=("red", "green")).describe(
        everything(torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 8, 8)), "cup", ["red", "green", "wall"]
    )
    weights = torch.tensor([2.0, 0.0, 2 / 3**0.5]).exp()
    assert list(seen) == ["red", "green", "wall"]
    assert list(seen.values()) == pytest.approx((weights / weights.sum()).tolist(), rel=1e-4)


@pytest.mark.usefixtures("planted")
def test_the_background_ends_the_search() -> None:
    found = retriever("x", vocabulary=("red", "green", "wall"), background="wall")
    assert [
        c.word for c in found.retrieve(everything(torch.tensor([1.0, 0.1, 0]).view(3, 1, 1).expand(3, 8, 8)), [])
    ] == ["red"]
    assert found.retrieve(everything(torch.full((3, 8, 8), 0.5)), []) == []


@pytest.mark.usefixtures("planted")
def test_a_small_visible_part_is_looked_at_closely() -> None:
    pixels = torch.tensor([0.0, 1.0, 0]).view(3, 1, 1).repeat(1, 32, 32)
    visible = torch.zeros(32, 32, dtype=torch.bool)
    visible[10:14, 10:14] = True
    pixels[:, 10:14, 10:14] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    view = View(pixels, pixels, visible)
    close = {c.word: c.score for c in retriever("x", vocabulary=("red", "green")).retrieve(view, [])}
    far = {c.word: c.score for c in retriever("x", vocabulary=("red", "green"), crop=False).retrieve(view, [])}
    assert close["red"] > far["red"] + 0.3


def test_the_visible_window_is_a_square_inside_the_image() -> None:
    visible = torch.zeros(32, 32, dtype=torch.bool)
    visible[0:10, 28:32] = True
    assert visible_window(visible, 0.1) == (0, 20, 12, 12)
    assert visible_window(torch.ones(32, 32, dtype=torch.bool), 0.1) == (0, 0, 32, 32)
    wide = torch.zeros(16, 64, dtype=torch.bool)
    wide[4:8, 10:50] = True
    assert visible_window(wide, 0.1) == (0, 6, 16, 48)  # nothing that is visible is cut off


def test_an_image_may_be_wider_than_high(clip_folder: Path) -> None:
    pixels = noise()[:, :24]
    visible = torch.zeros(24, 48, dtype=torch.bool)
    visible[2:10, 20:30] = True
    assert len(retriever(clip_folder).retrieve(View(pixels, pixels, visible), [])) == 5


def test_a_model_inside_a_package(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "small-clip").symlink_to(clip_folder)
    monkeypatch.syspath_prepend(str(tmp_path))
    view = everything(noise())
    carried = retriever("package:carrier/small-clip").retrieve(view, [])
    assert carried == retriever(clip_folder).retrieve(view, [])
    (package / "words.txt").write_text("cup\n")
    [only] = retriever(clip_folder, vocabulary="package:carrier/words.txt").retrieve(view, [])
    assert only.word == "cup"
    for model, message in (
        ("package:carrier/large-clip", "package 'carrier' has no large-clip"),
        ("package:carier/small-clip", "there is no package 'carier'"),
        ("package:carrier", "say what of the package, as in package:carrier/FOLDER"),
        ("package:", "say what of the package, as in package:NAME/FOLDER"),
        ("package:/small-clip", "there is no package ''"),
    ):
        with pytest.raises(InputError, match=f"^retriever.model: {model}: .*{message}"):
            retriever(model)


def test_the_built_in_vocabulary_is_in_order() -> None:
    words = read_vocabulary(None)
    assert words == sorted(set(words)) and len(words) > 1000
    assert {"cup", "ball", "figurine", "dog", "apple", "teddy bear"} <= set(words)
    assert all(word == word.lower().strip() for word in words)


def test_a_vocabulary_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# things\nCup\n\nball  # round\ncup\n")
    assert read_vocabulary(str(path)) == ["cup", "ball"]


def test_words_that_the_backbone_does_not_know_are_left_out(clip_folder: Path) -> None:
    found = retriever(clip_folder, vocabulary=("zyx", "cup"), top=9).retrieve(everything(noise()), [])
    assert [candidate.word for candidate in found] == ["cup"]


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "open_clip_config.json").write_text("{}")
    (pickled / "open_clip_model.bin").write_bytes(b"")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "open_clip_config.json").write_text("{}")
    (broken / "open_clip_model.safetensors").write_bytes(b"")
    blank = tmp_path / "blank.txt"
    blank.write_text("\n# nothing\n")
    for settings, message in (
        ({"model": "ViT-B-23"}, "'ViT-B-23'; it can be .*ViT-B-32"),
        ({"model": "ViT-B-32", "pretrained": "laion2b"}, "no weights 'laion2b'; they can be laion"),
        ({"model": f"local-dir:{tmp_path}/none"}, "no such folder: local-dir:.*/none"),
        ({"model": str(tmp_path)}, "no open_clip_config.json"),
        ({"model": str(pickled)}, "no weights as .safetensors"),
        ({"model": str(broken)}, "not a folder that open_clip can load"),
        ({"vocabulary": "nouns.text"}, "no such file: nouns.text"),
        ({"vocabulary": str(blank)}, "no word in .*blank.txt"),
        ({"vocabulary": ()}, "no word in the list"),
        ({"vocabulary": ("zyx",)}, "knows none of its 1 words"),
        ({"templates": "a photo"}, "'a photo' has no single {}"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            retriever(**({"folder": "ViT-B-32"} | settings))
        assert "\n" not in str(caught.value)
