"""Boxes, scores, words and masks against transformers itself, on the same folders, and by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_detectors
import torch
from icekit_detector.grounded_sam import GroundedSam
from icekit_detector.grounding import GroundingDino, corners, visible_shares
from icekit_detector.retriever import GroundingDinoRetriever
from torch import Tensor
from transformers import GroundingDinoForObjectDetection, GroundingDinoProcessor, SamModel, SamProcessor

from icekit.protocols import Candidate, InputError, View
from icekit.settings import validate
from icekit.testing.asserting import generator_of
from icekit.testing.scenes import NOUNS, Scene, two_objects
from icekit.testing.subjects import kit_backbone

SIZES = [(64, 64), (48, 96), (130, 70)]
ENDS = (101, 102, 1012, 1029)
"""BERT's numbers of [CLS], [SEP], . and ?"""


def detector(folder: Path, template: str = "a {}") -> GroundingDino:
    return GroundingDino(str(folder), "retriever.model", template, torch.device("cpu"))


def grounded_sam(dino: Path, sam: Path, **values: Any) -> GroundedSam:
    settings = validate(GroundedSam.Settings, {"detector": str(dino), "sam": str(sam), **values}, prefix="segmentor.")
    return GroundedSam(settings, kit_backbone())


def retriever(folder: Path, **values: Any) -> GroundingDinoRetriever:
    given = {"model": str(folder), "vocabulary": NOUNS, "threshold": 0.0, "visible_share": 0.0, "top": 100, **values}
    settings = validate(GroundingDinoRetriever.Settings, given, prefix="retriever.")
    return GroundingDinoRetriever(settings, kit_backbone())


def by_transformers(folder: Path, scene: Scene, words: Sequence[str]) -> tuple[Any, Any, Any]:
    """Its processor, the inputs that it makes of a list of words, and what its model says to them."""
    processor: Any = GroundingDinoProcessor.from_pretrained(folder)
    model = GroundingDinoForObjectDetection.from_pretrained(folder)
    inputs = processor(images=[scene.picture], text=[list(words)], return_tensors="pt")
    with torch.no_grad():
        return processor, inputs, model(**inputs)


# --- The detector ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_boxes_and_scores_are_those_of_the_processor(dino_folder: Path, size: tuple[int, int]) -> None:
    """Its score is the best over all pieces of the text: of a word of one piece, the others taken out."""
    scene = two_objects(size)
    processor, inputs, output = by_transformers(dino_folder, scene, ["cup"])
    ends = torch.isin(inputs["input_ids"][0], torch.tensor(ENDS))
    output.logits[0, :, : len(ends)] = output.logits[0, :, : len(ends)].masked_fill(ends, -torch.inf)
    [expected] = processor.post_process_grounded_object_detection(output, threshold=0.3, target_sizes=[size])
    finder = detector(dino_folder, "{}")
    [prompt] = finder.prompts(["cup"])
    found = finder.detect(scene.image, prompt)
    kept = found.scores[0] > 0.3
    assert 0 < int(kept.sum()) < len(kept)
    torch.testing.assert_close(found.scores[0][kept], expected["scores"])
    height, width = size
    limits = torch.tensor([width, height, width, height])
    torch.testing.assert_close(found.boxes[kept], expected["boxes"].clamp(min=0).minimum(limits))


def test_a_words_score_is_the_mean_over_its_own_pieces(dino_folder: Path) -> None:
    scene = two_objects((48, 96))
    _, inputs, output = by_transformers(dino_folder, scene, ["a ball", "a remote control", "a griffin"])
    finder = detector(dino_folder)
    [prompt] = finder.prompts(["ball", "remote control", "griffin"])
    assert prompt.text == "a ball. a remote control. a griffin."
    assert prompt.inputs["input_ids"].tolist() == inputs["input_ids"].tolist()
    # [CLS] a ball . a remote control . a g ##r ##i ##f ##f ##i ##n . [SEP]
    assert prompt.places == ((2,), (5, 6), tuple(range(9, 16)))
    likely = output.logits[0].sigmoid()
    expected = [likely[:, 2], likely[:, 5:7].mean(dim=1), likely[:, 9:16].mean(dim=1)]
    torch.testing.assert_close(finder.detect(scene.image, prompt).scores, torch.stack(expected))


def test_prompts_have_every_word_and_fit(dino_folder: Path) -> None:
    finder = detector(dino_folder)
    words = [f"{one} {other}" for one in NOUNS for other in ("griffin", "remote control", "a zebra", "metal")]
    prompts = finder.prompts(words)
    assert len(prompts) > 1
    assert [word for prompt in prompts for word in prompt.words] == words
    assert all(prompt.inputs["input_ids"].shape[1] <= 256 for prompt in prompts)
    # The first word of the next would not have fitted.
    first = prompts[0].inputs["input_ids"].shape[1]
    assert first + len(finder._tokenizer(f"a {prompts[1].words[0]}.", add_special_tokens=False)["input_ids"]) > 256
    assert [len(prompt.words) for prompt in finder.prompts(NOUNS, at_once=4)] == [4, 4, 2]


def test_dots_and_question_marks_do_not_end_a_word(dino_folder: Path) -> None:
    [prompt] = detector(dino_folder).prompts(["St. Bernard", "...", "what?", " CUP "])
    assert prompt.text == "a st bernard. a what. a cup."
    assert prompt.words == ("St. Bernard", "what?", " CUP ")


def test_a_word_that_is_too_long(dino_folder: Path) -> None:
    with pytest.raises(InputError, match=r"^'x x x .*' is 302 pieces of words long, .* Grounding DINO reads 254"):
        detector(dino_folder).prompts(["x " * 300])
    with pytest.raises(InputError, match=r"^retriever\.vocabulary: 'x,x,x,.*' is 301 pieces of words long"):
        retriever(dino_folder, vocabulary=["cup", "x," * 149 + "x"])


def test_a_tokenizer_whose_dot_is_another_piece(tmp_path: Path) -> None:
    folder = tiny_detectors.write_grounding_dino(tmp_path / "dino")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace('".": 1012', '".": 1011').replace('",": 1011', '",": 1012'))
    with pytest.raises(InputError, match=r"^retriever\.model = .*other numbers for \. and \?"):
        detector(folder)


def test_corners_by_hand() -> None:
    boxes = torch.tensor([[0.5, 0.5, 0.5, 1.0], [0.0, 1.0, 0.5, 0.5]])
    assert corners(boxes, 20, 40).tolist() == [[10, 0, 30, 20], [0, 15, 10, 20]]


def test_visible_shares_by_hand() -> None:
    visible = torch.zeros(4, 6, dtype=torch.bool)
    visible[:, 3:] = True
    visible[0] = False
    boxes = torch.tensor([[0, 0, 6, 4], [3, 1, 6, 4], [0, 0, 3, 4], [2.5, 1, 3.5, 2], [5.9, 4, 6, 4]])
    # The last two: a box that touches two pixels, one visible; and one of no height at the picture's lower edge.
    assert visible_shares(boxes, visible).tolist() == pytest.approx([9 / 24, 1, 0, 0.5, 1])


# --- The segmentor ---------------------------------------------------------------------------------------------------


def cut_out_by_transformers(folder: Path, scene: Scene, boxes: Tensor) -> Tensor:
    processor: Any = SamProcessor.from_pretrained(folder)
    model = SamModel.from_pretrained(folder)
    inputs = processor(scene.picture, input_boxes=[boxes.tolist()], return_tensors="pt")
    inputs["input_boxes"] = inputs["input_boxes"].float()
    with torch.no_grad():
        output = model(**inputs, multimask_output=False)
    [masks] = processor.post_process_masks(output.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    return masks[:, 0]


@pytest.mark.parametrize("size", SIZES)
def test_the_mask_is_what_sam_cuts_out_of_the_best_box(
    dino_folder: Path, sam_folder: Path, size: tuple[int, int]
) -> None:
    scene = two_objects(size)
    finder = detector(dino_folder)
    [prompt] = finder.prompts(["cup"])
    found = finder.detect(scene.image, prompt)
    best = found.boxes[int(found.scores[0].argmax())][None]
    segmentor = grounded_sam(dino_folder, sam_folder)
    mask = segmentor.segment(scene.view(), "cup", generator_of(0))
    assert torch.equal(mask, cut_out_by_transformers(sam_folder, scene, best)[0])
    assert 0.05 < float(mask.float().mean()) < 0.95
    # All boxes above the threshold, more than are cut out at once, in one mask.
    above = found.boxes[found.scores[0] > 0.05]
    assert len(above) > 8
    union = cut_out_by_transformers(sam_folder, scene, above).any(dim=0)
    several = grounded_sam(dino_folder, sam_folder, boxes="all", threshold=0.05)
    assert torch.equal(several.segment(scene.view(), "cup", generator_of(0)), union)
    assert not torch.equal(union, mask)


def test_no_box_no_mask(dino_folder: Path, sam_folder: Path) -> None:
    view = two_objects().view()
    assert not grounded_sam(dino_folder, sam_folder, threshold=0.9999).segment(view, "cup", generator_of(0)).any()
    assert not grounded_sam(dino_folder, sam_folder).segment(view, "...", generator_of(0)).any()


def test_boxes_of_what_is_erased_do_not_count(dino_folder: Path, sam_folder: Path) -> None:
    view = two_objects().view()
    everything = grounded_sam(dino_folder, sam_folder, boxes="all", threshold=0.0, visible_share=0.0)
    boxes = everything.boxes(view, "cup")
    visible = torch.zeros_like(view.visible)
    visible[:, :32] = True
    half = View(view.original, view.pixels, visible)
    for share in (0.25, 1.0):
        some = grounded_sam(dino_folder, sam_folder, boxes="all", threshold=0.0, visible_share=share)
        expected = boxes[visible_shares(boxes, visible) >= share]
        assert 0 < len(expected) < len(boxes)
        assert torch.equal(some.boxes(half, "cup"), expected)
    assert not everything.segment(half, "cup", generator_of(0))[:, 32:].any()


def test_folders_of_earlier_versions_are_the_same(dino_folder: Path, sam_folder: Path, tmp_path: Path) -> None:
    dino = tiny_detectors.as_published(tiny_detectors.write_grounding_dino(tmp_path / "dino"))
    sam = tiny_detectors.as_published(tiny_detectors.write_sam(tmp_path / "sam"))
    assert (dino / "vocab.txt").exists() and not (dino / "tokenizer.json").exists()
    view = two_objects((48, 96)).view()
    old, new = grounded_sam(dino, sam), grounded_sam(dino_folder, sam_folder)
    assert torch.equal(old.segment(view, "cup", generator_of(0)), new.segment(view, "cup", generator_of(0)))


def test_the_models_are_frozen(dino_folder: Path, sam_folder: Path) -> None:
    segmentor = grounded_sam(dino_folder, sam_folder)
    for model in (segmentor._sam.model, segmentor._detector._loaded.model):
        assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


# --- The retriever ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [80, 4])
def test_words_and_scores_are_those_of_the_best_boxes(dino_folder: Path, at_once: int) -> None:
    scene = two_objects((48, 96))
    expected = {}
    for start in range(0, len(NOUNS), at_once):
        words = NOUNS[start : start + at_once]
        _, _, output = by_transformers(dino_folder, scene, [f"a {word}" for word in words])
        # [CLS] a ball . a cube . ...: each noun is one piece
        best = output.logits[0].sigmoid().amax(dim=0)
        expected |= {word: float(best[2 + 3 * place]) for place, word in enumerate(words)}
    found = retriever(dino_folder, words_at_once=at_once).retrieve(scene.view(), [])
    assert [one.word for one in found] == sorted(expected, key=lambda word: -expected[word])
    assert {one.word: one.score for one in found} == pytest.approx(expected, abs=1e-5)
    assert all(0 <= one.score <= 1 for one in found)


def test_top_used_and_the_threshold(dino_folder: Path) -> None:
    view = two_objects().view()
    words = retriever(dino_folder).retrieve(view, [])
    some = retriever(dino_folder, top=3)
    assert some.retrieve(view, []) == words[:3]
    assert some.retrieve(view, [words[0].word.upper(), words[2].word]) == [words[1], *words[3:5]]
    middle = (words[4].score + words[5].score) / 2
    strict = retriever(dino_folder, threshold=middle)
    assert strict.retrieve(view, []) == words[:5]
    assert strict.retrieve(view, [one.word for one in words[:5]]) == []


def test_words_whose_boxes_are_erased_are_not_found(dino_folder: Path) -> None:
    view = two_objects().view()
    finder = detector(dino_folder)
    [prompt] = finder.prompts(NOUNS)
    detected = finder.detect(view.pixels, prompt)
    visible = torch.zeros_like(view.visible)
    visible[:, 40:] = True
    counts = visible_shares(detected.boxes, visible) >= 0.5
    assert 0 < int(counts.sum()) < len(counts)
    best = detected.scores[:, counts].amax(dim=1)
    found = retriever(dino_folder, visible_share=0.5).retrieve(View(view.original, view.pixels, visible), [])
    assert {one.word: one.score for one in found} == dict(zip(NOUNS, best.tolist(), strict=True))
    all_visible = retriever(dino_folder).retrieve(view, [])
    assert {one.word: one.score for one in found} != {one.word: one.score for one in all_visible}


def test_a_view_is_searched_once(dino_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    found = retriever(dino_folder)
    look = found._look

    def counted(view: View) -> list[Candidate]:
        looked.append("")
        return look(view)

    monkeypatch.setattr(found, "_look", counted)
    scene = two_objects()
    first = found.retrieve(scene.view(), [])
    assert found.retrieve(scene.view(), [first[0].word]) == first[1:] and len(looked) == 1
    found.retrieve(scene.view(scene.concepts[0].mask), [])
    assert len(looked) == 2


def test_a_vocabulary_file(dino_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("# what may be there\ncup\nBall\n\ncup\n", encoding="utf-8")
    found = retriever(dino_folder, vocabulary=str(tmp_path / "words.txt")).retrieve(two_objects().view(), [])
    assert sorted(one.word for one in found) == ["ball", "cup"]
    with pytest.raises(InputError, match=r"retriever\.vocabulary: no such file: .*none\.txt"):
        retriever(dino_folder, vocabulary=str(tmp_path / "none.txt"))


@pytest.mark.parametrize("key", ["threshold", "visible_share", "words_at_once", "top", "template"])
def test_settings_out_of_range(key: str) -> None:
    with pytest.raises(InputError, match=f"retriever.{key}"):
        validate(GroundingDinoRetriever.Settings, {key: "a {}." if key == "template" else -1}, prefix="retriever.")
