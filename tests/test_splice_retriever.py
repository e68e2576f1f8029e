"""The sparse decomposition against the conditions of its optimum, and the retriever on planted embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from icekit_process import icekit
from PIL import Image
from safetensors.torch import save_file
from scipy.optimize import nnls
from sklearn.linear_model import LassoLars
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from icekit import clip
from icekit.builtin.retrievers.splice import SAMPLE_PHOTOGRAPHS, SpliceRetriever, centred, sparse_weights
from icekit.protocols import InputError, View

BACKBONE: Any = SimpleNamespace(device=torch.device("cpu"), knows=lambda word: word != "zyx")
WORDS = ("cup", "ball", "cube", "bowl", "bottle", "vase")


def everything(*colour: float) -> View:
    pixels = torch.tensor(colour).view(3, 1, 1).expand(3, 8, 8)
    return View(pixels, pixels, torch.ones(8, 8, dtype=torch.bool))


def noise(seed: int = 0) -> View:
    pixels = torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(seed))
    return View(pixels, pixels, torch.ones(48, 48, dtype=torch.bool))


def retriever(model: Path | str, **settings: Any) -> SpliceRetriever:
    values = {"model": str(model), "vocabulary": WORDS, "background": (), "max_similarity": 1.0, "image_mean": "none"}
    return SpliceRetriever(SpliceRetriever.Settings.model_validate(values | settings), BACKBONE)


class PlantedClip:
    """A CLIP whose image embedding is the image's mean colour, and whose texts embed as planted.

    All words share a direction that images do not have, as real CLIPs' do. A second model, ``blind``, is wrong about
    everything but says so with certainty.
    """

    TEXTS: ClassVar = {
        "red": (1.0, 0, 0, 2),
        "crimson": (0.9, 0.1, 0, 2),
        "green": (0, 1.0, 0, 2),
        "blue": (0, 0, 1.0, 2),
        "wall": (0.6, 0.6, 0.6, 2),
    }

    def __init__(self, name: str) -> None:
        self.sign = -1 if name == "blind" else 1

    def encode_text(self, tokens: Tensor) -> Tensor:
        return tokens

    def encode_image(self, images: Tensor) -> Tensor:
        return F.pad(self.sign * images.mean(dim=(2, 3)), (0, 1))

    def tokenize(self, texts: list[str]) -> Tensor:
        return torch.tensor([next(v for k, v in self.TEXTS.items() if k in text) for text in texts])


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, *_: object) -> tuple[PlantedClip, Any]:
        model = PlantedClip(name)
        return model, model.tokenize

    monkeypatch.setattr(clip, "load_clip", load)
    monkeypatch.setattr(clip, "preprocess", lambda image, model: F.interpolate(image[None], size=(8, 8))[0])


def unit(count: int, length: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, length, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("penalty", [0.04, 0.2, 0.4, 0.6])
def test_the_weights_meet_the_conditions_of_the_optimum(penalty: float) -> None:
    concepts, image = unit(300, 64), unit(1, 64, seed=1)[0]
    weights = torch.tensor(sparse_weights(image, concepts, penalty)).double()
    left = concepts.double() @ (image.double() - concepts.double().T @ weights)  # c . (z - C^T w)
    assert (weights >= 0).all()
    assert (left <= penalty / 2 + 1e-4).all()
    assert left[weights > 0].tolist() == pytest.approx([penalty / 2] * int((weights > 0).sum()), abs=1e-4)
    assert 0 < int((weights > 0).sum()) < 64  # sparse, though not empty


def test_the_weights_are_those_of_non_negative_least_squares() -> None:
    """With w >= 0 the penalty is linear, so that the same optimum follows from least squares without one."""
    concepts, image, penalty = unit(12, 16), unit(1, 16, seed=1)[0], 0.1
    gram = (concepts @ concepts.T).double()
    factor = torch.linalg.cholesky(gram)  # |C^T w - z|^2 + lambda 1.w  =  |L^T w - L^-1 (C z - lambda / 2)|^2 + const
    goal = (concepts @ image).double() - penalty / 2
    right = torch.linalg.solve_triangular(factor, goal[:, None], upper=False)[:, 0]
    expected, _ = nnls(factor.T.numpy(), right.numpy())
    assert sparse_weights(image, concepts, penalty) == pytest.approx(expected.tolist(), abs=1e-4)


def test_orthogonal_concepts_by_hand() -> None:
    image = torch.tensor([0.8, 0.6, 0.0])  # each weight is the cosine less half the penalty, or nothing
    assert sparse_weights(image, torch.eye(3), 0.2) == pytest.approx([0.7, 0.5, 0.0], abs=1e-5)
    assert sparse_weights(image, torch.eye(3), 1.4) == pytest.approx([0.1, 0.0, 0.0], abs=1e-5)
    assert sparse_weights(image, torch.eye(3), 1.8) == [0, 0, 0]
    assert sparse_weights(-image, torch.eye(3), 0.2) == [0, 0, 0]


def test_the_published_penalty_in_two_dimensions() -> None:
    """Image z = (1, 0), c = (1, 0), d = (0.8, 0.6): both have a weight where 2 (C C^T w - C z) + lambda = 0, if w >= 0.

    With c alone (1 - w)^2 + 0.2 w is least at w = 0.9, and d, with a cosine of 0.8 * 0.1 = 0.08 to what is left, is
    below 0.1. In the form 2 lambda |w|_1 the same 0.2 would leave 0.8.
    """
    concepts = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    assert sparse_weights(torch.tensor([1.0, 0.0]), concepts, 0.2) == pytest.approx([0.9, 0.0], abs=1e-5)
    assert SpliceRetriever.Settings().l1_penalty == 0.2  # type: ignore[call-arg]


@pytest.mark.parametrize("penalty", [0.1, 0.2, 0.5])
def test_the_weights_are_those_of_least_angle_regression(penalty: float) -> None:
    """scikit-learn's other solver, which follows the path of all penalties; its alpha is of |.|^2 / (2 D)."""
    concepts, image = unit(40, 24), unit(1, 24, seed=1)[0]
    other = LassoLars(alpha=penalty / 48, positive=True, fit_intercept=False)
    other.fit(concepts.double().numpy().T, image.double().numpy())
    assert sparse_weights(image, concepts, penalty) == pytest.approx(other.coef_.tolist(), abs=1e-4)


def test_centring_by_hand() -> None:
    found = centred(torch.tensor([[1.0, 5.0], [2.0, 3.0]]), torch.tensor([1.0, 3.0]))
    assert found.tolist() == [[0, 1], [1, 0]]


@pytest.mark.usefixtures("planted")
def test_a_mixture_is_taken_apart() -> None:
    found = retriever("x", vocabulary=("red", "green", "blue"), l1_penalty=0.1)
    assert {c.word for c in found.retrieve(everything(0.9, 0.8, 0.0), [])} == {"red", "green"}
    assert [c.word for c in found.retrieve(everything(0.9, 0.0, 0.1), [])] == ["red"]


@pytest.mark.usefixtures("planted")
def test_words_that_say_the_same_share_a_weight_and_the_used_are_dropped() -> None:
    words = ("red", "crimson", "green", "blue")
    found = retriever("x", vocabulary=words, l1_penalty=0.01, max_similarity=0.98)
    seen = everything(0.9, 0.5, 0.0)
    first = [candidate.word for candidate in found.retrieve(seen, [])]
    assert "green" in first and {"red", "crimson"} & set(first)
    assert [candidate.word for candidate in found.retrieve(seen, ["red"])] == ["green"]
    assert len(retriever("x", vocabulary=words, l1_penalty=0.01, top=1).retrieve(seen, [])) == 1


@pytest.mark.usefixtures("planted")
def test_the_penalty_and_the_background_end_the_search() -> None:
    seen = everything(0.9, 0.1, 0.0)
    assert retriever("x", vocabulary=("red", "green", "blue"), l1_penalty=1.998).retrieve(seen, []) == []
    walled = retriever("x", vocabulary=("red", "green", "blue"), background="wall", l1_penalty=0.01)
    assert [candidate.word for candidate in walled.retrieve(seen, [])] == ["red"]
    assert walled.retrieve(everything(0.5, 0.5, 0.5), []) == []


@pytest.mark.usefixtures("planted")
def test_a_second_clip_ranks_anew_what_the_first_found() -> None:
    words, seen = ("red", "green", "blue"), everything(0.9, 0.7, 0.0)
    first = retriever("x", vocabulary=words, l1_penalty=0.1).retrieve(seen, [])
    assert [candidate.word for candidate in first] == ["red", "green"]
    again = retriever("x", vocabulary=words, l1_penalty=0.1, rerank=True, rerank_model="blind").retrieve(seen, [])
    assert [candidate.word for candidate in again] == ["green", "red"]
    assert all(candidate.score < 0 for candidate in again)  # cosine similarities of the second


@pytest.mark.usefixtures("planted")
def test_all_words_with_a_weight_are_ranked_anew_not_the_heaviest_alone() -> None:
    seen, values = everything(0.9, 0.7, 0.0), {"vocabulary": ("red", "green", "blue"), "l1_penalty": 0.1, "top": 1}
    assert [one.word for one in retriever("x", **values).retrieve(seen, [])] == ["red"]
    again = retriever("x", **values, rerank=True, rerank_model="blind").retrieve(seen, [])
    assert [one.word for one in again] == ["green"]  # the lighter of the two, and the second CLIP's first


@pytest.mark.usefixtures("planted")
def test_stop_words_have_their_share_and_are_not_proposed() -> None:
    seen, words = everything(0.9, 0.5, 0.0), ("red", "green", "blue", "wall")
    with_all = {one.word: one.score for one in retriever("x", vocabulary=words).retrieve(seen, [])}
    found = retriever("x", vocabulary=words, stop_words="Red, wall").retrieve(seen, [])
    assert "red" in with_all
    assert {one.word: one.score for one in found} == {"green": with_all["green"]}  # its weight beside "red", not alone


@pytest.mark.usefixtures("planted")
def test_the_second_clip_reads_bare_words(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    tokenize = PlantedClip.tokenize
    monkeypatch.setattr(PlantedClip, "tokenize", lambda self, texts: read.extend(texts) or tokenize(self, texts))
    found = retriever("x", vocabulary=("red", "green", "blue"), l1_penalty=0.1, rerank=True, rerank_model="blind")
    read.clear()
    found.retrieve(everything(0.9, 0.7, 0.0), [])
    assert read == ["red", "green"]


@pytest.mark.usefixtures("planted")
def test_the_image_mean_is_taken_off(tmp_path: Path) -> None:
    seen = everything(0.6, 0.6, 0.3)
    words = ("red", "green", "blue")
    assert {c.word for c in retriever("x", vocabulary=words, l1_penalty=0.1).retrieve(seen, [])} == {"red", "green"}
    save_file({"mean": torch.tensor([0.1, 0.9, 0.4, 0.0])}, tmp_path / "mean.safetensors")
    mean = str(tmp_path / "mean.safetensors")
    found = retriever("x", vocabulary=words, l1_penalty=0.1, image_mean=mean).retrieve(seen, [])
    assert found[0].word == "red" and "green" not in [candidate.word for candidate in found]


@pytest.mark.usefixtures("planted")
def test_the_mean_of_a_folder_of_images(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (10, 10), (0, 255, 0)).save(tmp_path / "b.png")
    (tmp_path / "notes.txt").write_text("no image")
    found = retriever("x", vocabulary=("red", "green", "blue"), image_mean=str(tmp_path))
    assert found._mean is not None and found._mean.tolist() == pytest.approx([0.5, 0.5, 0, 0])


def test_the_sample_photographs_are_there_without_a_network(clip_folder: Path) -> None:
    found = retriever(clip_folder, image_mean="photographs")
    assert found._mean is not None and found._mean.shape == (32,)
    assert 0 < float(found._mean.norm()) < 1  # a mean of different unit vectors
    assert len(SAMPLE_PHOTOGRAPHS) == 12


def test_on_a_real_clip_it_is_repeatable_and_sparse(clip_folder: Path) -> None:
    found = retriever(clip_folder, l1_penalty=0.02, rerank=True, rerank_model=str(clip_folder))
    once = found.retrieve(noise(), [])
    assert once == found.retrieve(noise(), [])
    assert 0 < len(once) < len(WORDS)
    assert all(candidate.word not in WORDS[:2] for candidate in found.retrieve(noise(), WORDS[:2]))


def test_what_is_wrong_is_named(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"a": torch.zeros(32), "b": torch.zeros(32)}, tmp_path / "two.safetensors")
    save_file({"a": torch.zeros(31)}, tmp_path / "short.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("no image")
    for settings, message in (
        ({"vocabulary": ("cup",)}, "needs two or more, but there is only 'cup'"),
        ({"image_mean": "photograph"}, "no such file or folder: photograph; it can be photographs, none"),
        ({"image_mean": str(tmp_path / "text.safetensors")}, "is not a .safetensors file"),
        ({"image_mean": str(tmp_path / "two.safetensors")}, "holds 2 tensors, expected the mean alone"),
        ({"image_mean": str(tmp_path / "short.safetensors")}, r"holds \[31\] numbers, but .* embeds in \[32\]"),
        ({"image_mean": str(tmp_path / "empty")}, "no image in the folder"),
        ({"image_mean": str(tmp_path / "broken")}, "a.png cannot be read as an image"),
        (
            {"rerank": True, "rerank_model": "ViT-H-15"},
            "retriever.rerank_model: there is no 'ViT-H-15'; it can be ViT-H-1",
        ),
        ({"rerank": True, "rerank_pretrained": "laion"}, "retriever.rerank_pretrained: ViT-H-14 has no"),
        ({"rerank_templates": "a photo"}, "retriever.rerank_templates: 'a photo' has no single {}"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            retriever(clip_folder, **settings)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_published_pair_runs_from_the_command_line(sd_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    picture = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0)) * 0.2
    picture[0, 20:70, 30:90] += 0.7
    to_pil_image(picture).save(tmp_path / "photo.png")
    settings = [
        f"backbone.model={sd_folder}",
        f"retriever.model={clip_folder}",
        f"retriever.vocabulary={json.dumps(WORDS)}",
        "retriever.background=",
        "retriever.image_mean=none",
        "retriever.l1_penalty=0.01",
        "segmentor.draws=1",
        "learner.steps=2",
        "samples=0",
        "max_concepts=1",
        "min_area=0.001",
    ]
    chosen = ["--retriever", "splice", "--segmentor", "diffseg", "--attribute", "colour", "--device", "cpu"]
    done = icekit(["run", "photo.png", *chosen, *(part for text in settings for part in ("--set", text))], tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "runs" / "photo" / "manifest.json").read_text())
    assert manifest["components"]["retriever"] == "splice" and manifest["components"]["segmentor"] == "diffseg"
    for concept in manifest["concepts"]:
        assert concept["label"] in WORDS and concept["score"] > 0
        with Image.open(tmp_path / "runs" / "photo" / concept["mask"]) as mask:
            assert mask.size == (128, 128) and mask.getbbox() is not None
