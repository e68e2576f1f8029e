"""The orchestrator, with components that take milliseconds."""

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import plain_components as plain
import pytest
import torch
from icekit_process import icekit, plain_plugin, start
from PIL import Image
from safetensors.torch import load_file

import icekit as icekit_api
from icekit import Candidate, InputError, RunError, View, extract, hookimpl
from icekit.builtin.attributes import COLOUR, MATERIAL
from icekit.plugins import Plugins
from icekit.protocols import NO_TOKENS, Attribute, FineTuning, Learned, Region, Step, token_names
from icekit.randomness import derived_seed
from icekit.run.directory import Located, RunDirectory
from icekit.run.locating import locate
from icekit.run.models import resolve_device
from icekit.run.ownership import EXPORTS
from icekit.run.showing import planned_samples
from icekit.settings import Settings, load_settings, merge

NAMES = {role: "plain" for role in ("backbone", "retriever", "segmentor", "learner")}


@pytest.fixture
def plugins() -> Plugins:
    return plain.beside_builtins()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def plain_settings(**given: Any) -> Settings:
    return load_settings(options=merge({"components": NAMES, "samples": 1}, given))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_run_directory(plugins: Plugins, photo: Path, tmp_path: Path) -> None:
    run = extract(photo, tmp_path / "run", plain_settings(max_concepts=2, seed=3), installed=plugins)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest == run.manifest
    assert list(manifest) == [
        "schema_version", "icekit_version", "image", "presets", "components", "backbone", "attributes", "seed",
        "concepts", "learning_steps", "plugins", "timings", "evaluations", "warnings", "files",
    ]  # fmt: skip
    assert manifest["image"]["source"] == str(photo)
    assert (manifest["image"]["width"], manifest["image"]["height"]) == (32, 32)
    assert manifest["image"]["fitted"] == {"source_width": 60, "source_height": 40, "box": [10, 0, 50, 40]}
    assert manifest["backbone"] == {"identity": "the words of plain", "rows": {"clip_l": plain.DIM}}
    assert manifest["components"] == NAMES
    assert manifest["seed"] == 3
    assert set(manifest["timings"]) == {"load_s", "localise_s", "learn_s", "generate_s"}
    [cup, bowl] = manifest["concepts"]
    assert bowl["tokens"] == {
        "category": "<red-bowl-1>",
        "instance": "<red-bowl-1-instance>",
        "colour": "<red-bowl-1-colour>",
        "material": "<red-bowl-1-material>",
    }
    assert bowl["mask"] == "masks/1-red-bowl.png"
    assert cup["area"] == pytest.approx(0.25 * 0.97, abs=0.02)
    assert {len(cup["words"]["colour"]), len(cup["words"]["material"])} == {3}
    assert "maroon" not in cup["words"]["colour"]

    assert sorted(files_of(tmp_path / "run")) == sorted(
        [
            "manifest.json",
            "README.md",
            "image.png",
            "settings.toml",
            "log.jsonl",
            "report.html",
            "embeddings.safetensors",
        ]
        + [EXPORTS]
        + [f"masks/{place}{mask}" for place in ("", "original/") for mask in ("0-cup.png", "1-red-bowl.png")]
        + [f"embeddings/{token.strip('<>')}.safetensors" for one in (cup, bowl) for token in one["tokens"].values()]
        + [
            f"samples/{index}-{part}{words}-0.png"
            for index in (0, 1)
            for part in ("object", "colour", "material")
            for words in ("", "-words")
        ]
        + [f"attention/{index}-{part}.png" for index in (0, 1) for part in cup["tokens"]]
    )
    for concept in run.concepts:
        with Image.open(concept.mask_file) as mask:
            assert (mask.mode, mask.size) == ("L", (32, 32))
            assert set(np.unique(np.asarray(mask))) == {0, 255}
    rows = load_file(tmp_path / "run" / "embeddings.safetensors")
    assert {row.dtype for row in rows.values()} == {torch.float32}
    assert {tuple(row.shape) for row in rows.values()} == {(plain.DIM,)}
    [(token, row)] = load_file(tmp_path / "run" / "embeddings" / "cup-0-colour.safetensors").items()
    assert token == "<cup-0-colour>"
    assert torch.equal(row, rows[token])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[1] == {"step": 2, "total": 20, "phase": "walk", "losses": {"total": 0.5}}


def test_settings_of_the_run_run_it_again(plugins: Plugins, photo: Path, tmp_path: Path) -> None:
    first = extract(photo, tmp_path / "a", plain_settings(seed=1), installed=plugins)
    again = extract(photo, tmp_path / "b", load_settings(tmp_path / "a" / "settings.toml"), installed=plugins)
    assert first.settings() == again.settings()
    assert first.settings().learner["rate"] == 0.5  # the backbone's own preset
    differing = {name for name, data in files_of(tmp_path / "a").items() if data != files_of(tmp_path / "b")[name]}
    assert differing <= {"manifest.json", "report.html"}  # they tell the time


def test_seed_changes_the_tokens(plugins: Plugins, photo: Path, tmp_path: Path) -> None:
    runs = [extract(photo, tmp_path / str(s), plain_settings(seed=s), installed=plugins) for s in (0, 1)]
    assert not torch.equal(*(run.tokens["<cup-0>"]["clip_l"] for run in runs))


def test_two_sides(plugins: Plugins, photo: Path, tmp_path: Path) -> None:
    """The middle of the picture in the proportions of the backbone's images: 40 rows and 60 columns to 24 and 48."""
    backbone = {"image_size": [24, 48]}
    run = extract(photo, tmp_path / "run", plain_settings(backbone=backbone), installed=plugins)
    image = run.manifest["image"]
    assert (image["height"], image["width"], image["fitted"]["box"]) == (24, 48, [0, 5, 60, 35])
    assert [one.mask().shape for one in run.concepts] == [(24, 48)] * 4
    for file in [tmp_path / "run" / "image.png", *(tmp_path / "run" / "samples").iterdir()]:
        with Image.open(file) as picture:
            assert picture.size == (48, 24)
    with Image.open(tmp_path / "run" / "attention" / "0-colour.png") as picture:
        assert picture.size == (264, 132)  # of 12 x 24 cells
    assert 'viewBox="0 0 48 24"' in (tmp_path / "run" / "report.html").read_text()


def test_the_backbones_own_way_of_generating(plugins: Plugins, photo: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """All samples in one call; how they are made is the backbone's to say, unless somebody says it."""
    asked: list[dict[str, Any]] = []
    generate = plain.PlainBackbone.generate

    def recorded(self: Any, prompts: Sequence[str], **options: Any) -> Any:
        asked.append(options | {"prompts": list(prompts)})
        return generate(self, prompts, **options)

    monkeypatch.setattr(plain.PlainBackbone, "generate", recorded)
    extract(photo, tmp_path / "run", plain_settings(max_concepts=1, samples=2), installed=plugins)
    [call] = asked
    assert len(call["prompts"]) == 2 * 3 * 2
    assert (call["steps"], call["guidance_scale"]) == (None, None)
    assert "<cup-0>" in call["tokens"]
    asked.clear()
    chosen = plain_settings(max_concepts=1, sample_steps=3, guidance_scale=2.0)
    extract(photo, tmp_path / "other", chosen, installed=plugins)
    assert [(call["steps"], call["guidance_scale"]) for call in asked] == [(3, 2.0)]


# --- Stage one -------------------------------------------------------------------------------------------------------


def words_of(settings: Settings, ghosts: int = 1, segmentor: Any = None) -> list[str]:
    backbone = plain.PlainBackbone(plain.PlainBackbone.Settings(), torch.device("cpu"))
    retriever = plain.PlainRetriever(plain.PlainRetriever.Settings(ghosts=ghosts), backbone)
    segmentor = segmentor or plain.PlainSegmentor(plain.PlainSegmentor.Settings(), backbone)
    located = locate(torch.rand(3, 32, 32), retriever, segmentor, settings)
    assert located.finished
    assert [region.index for region in located.regions] == list(range(len(located.regions)))
    covered = torch.stack([region.mask for region in located.regions] or [torch.zeros(32, 32)]).sum(dim=0)
    assert covered.max() <= 1  # nothing is found twice
    return [region.word for region in located.regions]


def test_loop_ends_with_the_words() -> None:
    assert words_of(Settings(min_visible=0.0)) == list(plain.WORDS)


def test_loop_ends_when_enough_is_found_or_little_is_left() -> None:
    assert words_of(Settings(max_concepts=3)) == list(plain.WORDS[:3])
    assert words_of(Settings(min_visible=0.3)) == list(plain.WORDS[:3])
    assert words_of(Settings(min_visible=0.6)) == list(plain.WORDS[:2])


def test_loop_ends_when_the_first_words_have_no_region() -> None:
    assert words_of(Settings(), ghosts=4) == list(plain.WORDS)
    assert words_of(Settings(), ghosts=5) == []
    assert words_of(Settings(min_area=0.3)) == []


def test_masks_that_are_proposed_are_all_there_is() -> None:
    backbone = plain.PlainBackbone(plain.PlainBackbone.Settings(), torch.device("cpu"))
    proposing = plain.ProposingSegmentor(plain.PlainSegmentor.Settings(), backbone)
    assert words_of(Settings(), ghosts=0, segmentor=proposing) == ["vase", "ball", "mug"]
    assert words_of(Settings(max_concepts=1), ghosts=0, segmentor=proposing) == ["vase"]


def test_regions_are_named_again_by_what_they_show() -> None:
    backbone = plain.PlainBackbone(plain.PlainBackbone.Settings(), torch.device("cpu"))

    class SeesOneThingInARegion(plain.PlainRetriever):
        def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
            shown = float(view.visible.float().mean())
            alone = [Candidate("mug", 0.9), Candidate("pot", 0.5)] if shown < 0.3 else []
            return [word for word in alone if word.word not in used] or super().retrieve(view, used)

    retriever = SeesOneThingInARegion(plain.PlainRetriever.Settings(), backbone)
    segmentor = plain.PlainSegmentor(plain.PlainSegmentor.Settings(), backbone)
    for naming, words in (("alone", ["mug", "pot"]), ("retrieved", list(plain.WORDS)[:2])):
        settings = Settings.model_validate({"max_concepts": 2, "naming": naming})
        last = locate(torch.rand(3, 32, 32), retriever, segmentor, settings)
        assert [region.word for region in last.regions] == words


def test_regions_are_named_together() -> None:
    """The first region would take the word that the second one fits better."""
    backbone = plain.PlainBackbone(plain.PlainBackbone.Settings(), torch.device("cpu"))

    class SeesTwoThings(plain.PlainRetriever):
        def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
            if float(view.visible.float().mean()) >= 0.3:
                return super().retrieve(view, used)
            first = int((view.visible & plain.quadrant("cup")).sum()) > 100  # its edge is frayed
            scores = {"mug": 0.6, "pot": 0.5} if first else {"mug": 0.9, "pot": 0.1}
            return [Candidate(word, score) for word, score in scores.items() if word not in used]

    retriever = SeesTwoThings(plain.PlainRetriever.Settings(), backbone)
    segmentor = plain.PlainSegmentor(plain.PlainSegmentor.Settings(), backbone)
    settings, changes = Settings(max_concepts=2, naming="alone"), []
    locate(torch.rand(3, 32, 32), retriever, segmentor, settings, on_change=changes.append)
    [_, second, last] = changes
    assert [region.word for region in second.regions] == ["mug", "pot"]
    assert [(region.word, region.score) for region in last.regions] == [("pot", 0.5), ("mug", 0.9)]


@pytest.mark.parametrize(
    ("naming", "whole", "words"),
    [
        ("alone", 0.5, ["mug", "pot"]),  # (0.9 + 0.4) / 2 fits better than 0.5, and the better part is kept first
        ("alone", 0.7, ["jug"]),
        ("retrieved", 0.5, ["jug"]),
    ],
)
def test_a_region_is_cut_where_two_words_fit_better_than_one(naming: Any, whole: float, words: list[str]) -> None:
    backbone = plain.PlainBackbone(plain.PlainBackbone.Settings(), torch.device("cpu"))
    left, right = torch.zeros(2, 32, 32, dtype=torch.bool)
    left[8:18, 2:12] = right[8:18, 20:30] = True

    class FindsBoth(plain.PlainSegmentor):
        def segment(self, view: View, word: str, generator: torch.Generator) -> torch.Tensor:
            return (left | right) & view.visible

    class KnowsThem(plain.PlainRetriever):
        def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
            there = (bool((view.visible & left).any()), bool((view.visible & right).any()))
            said = {(True, True): ("jug", whole), (True, False): ("mug", 0.9), (False, True): ("pot", 0.4)}
            return [Candidate(*said[there])] if there in said and said[there][0] not in used else []

    parts = KnowsThem(plain.PlainRetriever.Settings(), backbone), FindsBoth(plain.PlainSegmentor.Settings(), backbone)
    last = locate(torch.rand(3, 32, 32), *parts, Settings(naming=naming, same_word="once"))
    assert [region.word for region in last.regions] == words
    if len(words) == 2:
        assert [torch.equal(last.regions[i].mask, mask) for i, mask in enumerate((left, right))] == [True, True]


@pytest.mark.parametrize("segmentor", [plain.PlainSegmentor, plain.ProposingSegmentor])
def test_regions_are_described_alone_if_the_retriever_can(segmentor: type) -> None:
    backbone = plain.PlainBackbone(plain.PlainBackbone.Settings(), torch.device("cpu"))
    image = torch.rand(3, 32, 32)

    class Describes(plain.PlainRetriever):
        def describe(self, view: View, noun: str, words: Sequence[str]) -> dict[str, float]:
            assert torch.equal(view.pixels[:, view.visible], image[:, view.visible])
            assert (view.pixels[:, ~view.visible].std(dim=1) < 1e-5).all()
            return {words[0]: 1.0}

    def hints(retriever: type[plain.PlainRetriever], naming: Any) -> list[Mapping[str, Mapping[str, float]]]:
        parts = (retriever(plain.PlainRetriever.Settings(), backbone), segmentor(segmentor.Settings(), backbone))
        settings, changes = Settings(max_concepts=2, naming=naming), []
        locate(image, *parts, settings, attributes=[COLOUR, MATERIAL], on_change=changes.append)
        [*before, last] = changes
        assert not any(region.hints for located in before for region in located.regions)
        return [region.hints for region in last.regions]

    assert hints(Describes, "described") == [{"colour": {"red": 1.0}, "material": {"metal": 1.0}}] * 2
    assert hints(Describes, "alone") == hints(plain.PlainRetriever, "described") == [{}, {}]


@pytest.mark.parametrize("known", [1, 2, 3])
def test_going_on_from_any_region_finds_the_same(known: int) -> None:
    backbone = plain.PlainBackbone(plain.PlainBackbone.Settings(), torch.device("cpu"))
    retriever = plain.PlainRetriever(plain.PlainRetriever.Settings(), backbone)
    for segmentor in (plain.PlainSegmentor, plain.ProposingSegmentor):
        parts = (torch.rand(3, 32, 32), retriever, segmentor(segmentor.Settings(), backbone), Settings())
        changes: list[Located] = []
        whole = locate(*parts, on_change=changes.append)
        rest = locate(*parts, located=changes[known - 1])
        assert [region.word for region in rest.regions] == [region.word for region in whole.regions]
        assert all(torch.equal(a.mask, b.mask) for a, b in zip(rest.regions, whole.regions, strict=True))


def test_nothing_found_says_what_was_tried(plugins: Plugins, photo: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no concept found .*ghost 0, ghost 1.*ghost 4"):
        extract(photo, tmp_path / "run", plain_settings(retriever={"ghosts": 6}), installed=plugins)


# --- Interrupted -----------------------------------------------------------------------------------------------------


def test_failure_keeps_what_was_done(plugins: Plugins, photo: Path, tmp_path: Path) -> None:
    whole = extract(photo, tmp_path / "whole", plain_settings(), installed=plugins)
    with pytest.raises(RunError, match="ValueError: two"):
        extract(photo, tmp_path / "run", plain_settings(learner={"fail_at": 13}), installed=plugins)
    assert not (tmp_path / "run" / "manifest.json").exists()
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 12
    state = tmp_path / "run" / "checkpoint" / "run.json"
    record = json.loads(state.read_text())
    record["settings"]["learner"]["fail_at"] = None
    state.write_text(json.dumps(record))
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 13, "tot')  # as a killed process leaves it
    resumed = extract(photo, tmp_path / "run", resume=True, installed=plugins)
    assert resumed.tokens.keys() == whole.tokens.keys()
    assert all(torch.equal(rows["clip_l"], whole.tokens[token]["clip_l"]) for token, rows in resumed.tokens.items())
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == (tmp_path / "whole" / "log.jsonl").read_bytes()
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.timeout(1200)  # four processes, each of which imports torch
@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(plugins: Plugins, photo: Path, tmp_path: Path) -> None:
    plugin = plain_plugin(tmp_path / "plugin")
    slow = ["--set", "learner.pause=0.05", "--set", "segmentor.pause=0.15", "--set", "samples=1"]
    command = ["run", photo, *plain.OPTIONS, *slow, "--out"]
    options = {"learner": {"pause": 0.05}, "segmentor": {"pause": 0.15}}
    extract(photo, tmp_path / "whole", plain_settings(**options), installed=plugins)
    moments = {
        "regions": lambda run: len(list(run.glob("masks/*.png"))) == 2,
        "learning": lambda run: (run / "log.jsonl").exists() and (run / "log.jsonl").read_text().count("\n") >= 8,
        "samples": lambda run: any(run.glob("samples/*.png")),
    }
    kills = 0
    run = tmp_path / "run"
    for reached in moments.values():
        process = start([*command, "run", "--resume"], tmp_path, plugin)
        while process.poll() is None and not reached(run):
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 2
    finished = icekit([*command, "run", "--resume"], tmp_path, plugin)
    assert finished.returncode == 0, finished.stderr
    ours, theirs = files_of(run), files_of(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {"manifest.json", "report.html"}


def test_resume_refuses_what_changed(plugins: Plugins, photo: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(RunError, match="ValueError: two"):
        extract(photo, run, plain_settings(seed=4, learner={"fail_at": 2}), installed=plugins)
    for given, message in [
        ({"seed": 5}, "seed was 4, now 5"),
        ({"seed": 0}, "seed was 4, now 0"),
        ({"learner": {"steps": 3}}, "learner.steps was 20, now 3"),
        ({"components": {"segmentor": "proposing"}}, "components.segmentor was plain, now proposing"),
    ]:
        with pytest.raises(InputError, match=message):
            extract(photo, run, load_settings(options=given), resume=True, installed=plugins)
    with pytest.raises(RunError, match="ValueError: two"):  # the same again, in another spelling
        extract(
            photo, run, load_settings(options={"seed": 4, "learner": {"steps": "20"}}), resume=True, installed=plugins
        )
    Image.new("RGB", (50, 50)).save(tmp_path / "other.png")
    with pytest.raises(InputError, match=r"the image was .*photo.png, now .*other.png"):
        extract(tmp_path / "other.png", run, resume=True, installed=plugins)


def test_resume_of_a_complete_run_changes_nothing(plugins: Plugins, photo: Path, tmp_path: Path) -> None:
    first = extract(photo, tmp_path / "run", plain_settings(), installed=plugins)
    before = files_of(tmp_path / "run")
    assert extract(photo, tmp_path / "run", resume=True, installed=plugins).manifest == first.manifest
    assert files_of(tmp_path / "run") == before
    with pytest.raises(InputError, match="seed was 0, now 1"):
        extract(photo, tmp_path / "run", plain_settings(seed=1), resume=True, installed=plugins)


# --- Observers -------------------------------------------------------------------------------------------------------


class Watcher:
    def __init__(self) -> None:
        self.heard: list[str] = []

    @hookimpl
    def run_started(self, run_dir, settings):
        self.heard.append("run_started")

    @hookimpl
    def stage_started(self, name):
        self.heard.append(name)

    @hookimpl
    def region_found(self, region):
        self.heard.append(region.label)

    @hookimpl
    def step_done(self, step):
        self.heard.append(f"step {step.step}")

    @hookimpl
    def image_generated(self, done, total):
        self.heard.append(f"image {done}/{total}")

    @hookimpl
    def run_finished(self, extraction):
        self.heard.append(f"finished {len(extraction.concepts)}")

    @hookimpl
    def run_failed(self, error):
        self.heard.append(f"failed {error}")


def test_observers_hear_everything(plugins: Plugins, photo: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    settings = plain_settings(max_concepts=1, attributes=["colour"], learner={"steps": 2})
    extract(photo, tmp_path / "run", settings, observers=[watcher], installed=plugins)
    assert watcher.heard == [
        *("load", "run_started", "localise", "cup", "learn", "step 1", "step 2"),
        *("generate", "image 1/4", "image 2/4", "image 3/4", "image 4/4", "export", "finished 1"),
    ]
    with pytest.raises(InputError):
        extract(photo, tmp_path / "run", settings, observers=[watcher], installed=plugins)
    assert watcher.heard[-1].startswith("failed")


def test_observer_that_raises_does_not_end_the_run(
    plugins: Plugins, photo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Clumsy:
        @hookimpl
        def step_done(self, step):
            raise KeyError("oops")

    watcher = Watcher()
    plugins.manager.register(Clumsy(), "clumsy")
    extract(photo, tmp_path / "run", plain_settings(), observers=[watcher], installed=plugins)
    assert "step 20" in watcher.heard
    [record] = caplog.records
    assert "clumsy" in record.getMessage()


# --- What the words alone would have given ---------------------------------------------------------------------------


class Describes(plain.PlainRetriever):
    """Sees that everything is red, or else rubber."""

    def describe(self, view: View, noun: str, words: Sequence[str]) -> dict[str, float]:
        return {word: 0.7 if word == "red" else 0.2 if word == "rubber" else 0.01 for word in words}


class Batches(plain.PlainBackbone):
    """Makes three images at once, and keeps what it was asked to generate."""

    class Settings(plain.PlainBackbone.Settings):
        images_at_once: int = 3

    asked: ClassVar[list[tuple[list[str], list[int], bool, set[int]]]] = []

    def generate(self, prompts: Sequence[str], *, seeds: Sequence[int], tuning: Any = None, **options: Any) -> Any:
        self.asked.append((list(prompts), list(seeds), bool(tuning), set(options["skip"])))
        return super().generate(prompts, seeds=seeds, **options)


def test_samples_of_the_words_alone(plugins: Plugins, photo: Path, tmp_path: Path, monkeypatch: Any) -> None:
    learn = plain.PlainLearner.learn

    def with_lora(self: Any, *arguments: Any, **options: Any) -> Learned:
        tuning = FineTuning(lora={"unet.to_q.lora_A.weight": torch.zeros(1)})
        return Learned(learn(self, *arguments, **options).tokens, tuning)

    monkeypatch.setattr(plain, "PlainRetriever", Describes)
    monkeypatch.setattr(plain, "PlainBackbone", Batches)
    monkeypatch.setattr(plain.PlainLearner, "learn", with_lora)
    Batches.asked.clear()
    settings = plain_settings(max_concepts=1, samples=2)
    run = extract(photo, tmp_path / "run", settings, installed=plugins)

    [cup] = run.manifest["concepts"]
    assert cup["words_alone"] == {"object": "red rubber cup", "colour": "red cup", "material": "rubber cup"}
    assert (cup["described"]["colour"][0], cup["described"]["material"][0]) == ("red", "rubber")
    assert len(cup["described"]["colour"]) == 3
    learned, alone = Batches.asked
    assert alone[0] == [f"a photo of a {words} cup" for words in ("red rubber", "red", "rubber") for _ in range(2)]
    assert learned[1] == alone[1]  # the same noise
    assert (learned[2], alone[2]) == (True, False)  # the words alone: the model before any learning

    # Interrupted in the middle of a batch: that one is made again as a whole, the pictures are the same.
    saved, save_sample = [], RunDirectory.save_sample

    def interrupted(self: RunDirectory, *arguments: Any, **options: Any) -> None:
        if len(saved) == 7:
            raise KeyboardInterrupt
        saved.append(arguments[:3])
        save_sample(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunDirectory, "save_sample", interrupted)
        extract(photo, tmp_path / "again", settings, installed=plugins)
    Batches.asked.clear()
    extract(photo, tmp_path / "again", settings, resume=True, installed=plugins)
    assert Batches.asked == [(*alone[:3], {0})]
    assert files_of(tmp_path / "again" / "samples") == files_of(tmp_path / "run" / "samples")

    plainly = plain_settings(max_concepts=1, words_alone=False, naming="alone")
    without = extract(photo, tmp_path / "off", plainly, installed=plugins)
    assert without.manifest["concepts"][0]["words_alone"]["colour"] == "cup"  # nobody was asked for its colour
    assert without.manifest["concepts"][0]["described"] == {}
    assert sorted(files_of(tmp_path / "off" / "samples")) == ["0-colour-0.png", "0-material-0.png", "0-object-0.png"]


def test_words_alone_are_english() -> None:
    orange = Region(0, "ball", 1.0, torch.ones(2, 2, dtype=torch.bool), {"colour": {"orange": 0.6, "red": 0.4}})
    colour = Attribute("colour", "colour", ("orange", "red"))
    tokens = {name: {"clip_l": torch.zeros(1)} for name in token_names(orange, [colour]).values()}
    samples = planned_samples([orange], tokens, Settings(samples=1), [colour])
    assert [(one.part, one.words_alone) for one in samples] == [
        ("object", False), ("colour", False), ("object", True), ("colour", True)
    ]  # fmt: skip
    assert {one.prompt for one in samples if one.words_alone} == {"a photo of an orange ball"}
    assert samples[0].prompt == "a photo of a <ball-0-instance> <ball-0>"
    [alone] = planned_samples([orange], NO_TOKENS, Settings(samples=1, words_alone=False), [])
    assert alone.part == "object"


# --- Components that break their word --------------------------------------------------------------------------------


def test_wrong_mask_names_the_segmentor(photo: Path, tmp_path: Path, plugins: Plugins, monkeypatch: Any) -> None:
    monkeypatch.setattr(plain.PlainSegmentor, "segment", lambda self, view, word, generator: torch.ones(8, 8))
    with pytest.raises(RunError, match=r"segmentor 'plain' of plugin .* returned a mask of dtype float32: bool is"):
        extract(photo, tmp_path / "run", plain_settings(), installed=plugins)


def test_missing_token_names_the_learner(photo: Path, tmp_path: Path, plugins: Plugins, monkeypatch: Any) -> None:
    """Each mistake is said for itself."""
    good = {"clip_l": torch.zeros(plain.DIM)}
    mistakes: dict[str, dict[str, torch.Tensor] | None] = {
        "1 of 2 tokens: <cup-0-instance> is missing": None,
        "the token <cup-0-instance> with rows for none: 'clip_l' is right": {},
        r"a row of shape \[9\]: \[8\] is right": {"clip_l": torch.zeros(plain.DIM + 1)},
        "a row with numbers that are not finite": {"clip_l": torch.full((plain.DIM,), torch.nan)},
        "a row of dtype float64: float32 is right": {"clip_l": torch.zeros(plain.DIM, dtype=torch.float64)},
        "a row with a gradient": {"clip_l": torch.zeros(plain.DIM, requires_grad=True)},
        "with rows for 'clip_g': 'clip_l' is right": {"clip_g": torch.zeros(plain.DIM)},
        "more tokens than it was asked for: <cup-0-mood> is too many": good,
    }
    chosen = plain_settings(max_concepts=1, attributes=())
    for number, (message, row) in enumerate(mistakes.items()):
        tokens = {"<cup-0>": good} | ({} if row is None else {"<cup-0-instance>": row})
        tokens |= {"<cup-0-mood>": good} if row is good else {}
        monkeypatch.setattr(plain.PlainLearner, "learn", lambda *a, tokens=tokens, **k: Learned(tokens))
        with pytest.raises(RunError, match=rf"^learner 'plain' of plugin .* returned .*{message}"):
            extract(photo, tmp_path / str(number), chosen, installed=plugins)


def test_a_loss_that_is_no_number_ends_the_run(photo: Path, tmp_path: Path, plugins: Plugins, monkeypatch: Any) -> None:
    """And is not written into the log, which would be no JSON."""

    def learn(self: Any, *arguments: Any, on_step: Any, **options: Any) -> None:
        on_step(Step(1, 2, "walk", {"total": 0.5}))
        on_step(Step(2, 2, "walk", {"total": 0.5, "attention": float("nan")}))

    monkeypatch.setattr(plain.PlainLearner, "learn", learn)
    with pytest.raises(RunError, match="learner 'plain': the loss 'attention' became nan in step 2"):
        extract(photo, tmp_path / "run", plain_settings(), installed=plugins)
    [line] = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1


# --- Pieces ----------------------------------------------------------------------------------------------------------


def test_derived_seeds_differ_by_purpose() -> None:
    seeds = {derived_seed(0), derived_seed(1), derived_seed(0, "a"), derived_seed(0, "a", 1), derived_seed(0, "a", 2)}
    assert len(seeds) == 5
    assert derived_seed(7, "sample", 1) == derived_seed(7, "sample", 1)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_device() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device 'cuda' is not available here: choose auto or"):
            resolve_device("cuda")


def test_public_names_exist() -> None:
    assert all(getattr(icekit_api, name) is not None for name in icekit_api.__all__)
    with pytest.raises(AttributeError, match="nope"):
        icekit_api.nope  # noqa: B018
    assert "icekit" in sys.modules
