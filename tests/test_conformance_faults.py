"""The conformance checks find what is wrong: plain components of every kind that pass, each broken in one way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import Field, field_serializer

from icekit.protocols import (
    Attribute,
    BenchPicture,
    Candidate,
    Checkpoint,
    Column,
    ComponentSettings,
    ExecutorSettings,
    InputError,
    JobResult,
    Learned,
    Proposal,
    RunError,
    Score,
    Step,
    TrueConcept,
    Work,
    token_names,
)
from icekit.randomness import seeded_generator
from icekit.testing import (
    KINDS,
    AttributeUnderTest,
    DatasetUnderTest,
    ExecutorUnderTest,
    ExporterUnderTest,
    LearnerUnderTest,
    MetricUnderTest,
    RetrieverUnderTest,
    SegmentorUnderTest,
    check_segmentor,
    checks_of,
    components,
    parametrize_with_checks,
    run_check,
    run_checks,
)
from icekit.testing.scenes import ten_objects


class OneWord:
    """Always sees a ball, and then a cube."""

    class Settings(ComponentSettings):
        score: float = Field(0.5, description="of each word")

    def __init__(self, settings: Settings, backbone: Any) -> None:
        self.settings = settings

    def retrieve(self, view: Any, used: Sequence[str]) -> Any:
        gone = {word.casefold() for word in used}
        return [Candidate(word, self.settings.score) for word in ("ball", "cube") if word not in gone]

    def describe(self, view: Any, noun: str, words: Sequence[str]) -> Mapping[str, float]:
        return dict.fromkeys(words, 1 / len(words)) if words else {}

    space = "one word"

    def embed(self, view: Any) -> torch.Tensor:
        return torch.tensor([0.0, 1.0])

    @staticmethod
    def text_encoder(settings: Any, device: torch.device) -> Any:
        return SimpleNamespace(space="one word", embed=lambda texts: torch.tensor([[1.0, 0.0]] * len(texts)))


class Half:
    """A random half of what is visible."""

    class Settings(ComponentSettings):
        share: float = Field(0.5, description="of what is visible")

    def __init__(self, settings: Settings, backbone: Any) -> None:
        self.settings = settings

    def segment(self, view: Any, word: str, generator: torch.Generator) -> Any:
        return view.visible & (torch.rand(view.visible.shape, generator=generator) < self.settings.share)


class Quadrants:
    """Proposes both halves of any picture."""

    class Settings(ComponentSettings):
        """There are none."""

    def __init__(self, settings: Settings, backbone: Any) -> None: ...

    def propose(self, image: torch.Tensor) -> Any:
        mask = torch.zeros(image.shape[1:], dtype=torch.bool)
        mask[:, : mask.shape[1] // 2] = True
        return [Proposal(mask), Proposal(~mask, "ball")]


class Walk:
    """A random walk from the word's row."""

    class Settings(ComponentSettings):
        steps: int = Field(4, description="of the walk")

    def __init__(self, settings: Settings, backbone: Any) -> None:
        self.settings, self.backbone = settings, backbone

    def learn(
        self, image: Any, regions: Any, attributes: Any, *, seed: int, checkpoint: Checkpoint, on_step: Any
    ) -> Learned:
        rows = {
            token: {encoder: row.clone() for encoder, row in self.backbone.word_rows(region.word).items()}
            for region in regions
            for token in token_names(region, attributes).values()
        }
        done = self.restore(rows, checkpoint)
        for step in range(done + 1, self.settings.steps + 1):
            generator = seeded_generator(seed, "walk", step)
            self.walk(rows, generator)
            flat = {f"{name} {encoder}": row for name, token in rows.items() for encoder, row in token.items()}
            checkpoint.save(flat, {"step": step})
            on_step(Step(step, self.settings.steps, "walk", {"total": self.loss(step)}))
        return Learned(rows)

    def restore(self, rows: Any, checkpoint: Checkpoint) -> int:
        saved = checkpoint.load()
        if saved is None:
            return 0
        for name, token in rows.items():
            for encoder in token:
                token[encoder] = saved[0][f"{name} {encoder}"]
        return int(saved[1]["step"])

    def walk(self, rows: Any, generator: torch.Generator) -> None:
        for token in rows.values():
            for row in token.values():
                row += 0.1 * torch.randn(row.shape, generator=generator)

    def loss(self, step: int) -> float:
        latents = torch.zeros(1, *self.backbone.latent_shape)
        with torch.no_grad():
            encoded = self.backbone.encode_prompts(["a ball"])
            output = self.backbone.predict(latents, torch.tensor([0.5]), encoded).output
        if not bool(output.isfinite().all()):
            raise RunError(f"the loss became NaN in step {step}")
        return float(output.square().mean())


class Found:
    """Share of objects found."""

    class Settings(ComponentSettings):
        """There are none."""

    columns: Mapping[str, Column] = {"found": Column("objects found")}
    needs: Sequence[str] = ("masks",)

    def __init__(self, settings: Settings, backbone: Any) -> None: ...

    def prepare(self, images: Any) -> None: ...

    def measure(self, outcome: Any) -> Any:
        found = [one for one in outcome.matches if one.found]
        prompts = [f"a photo of {one.found.region.word}" for one in found]
        for prompt in prompts:
            outcome.generate(prompt)
        return {"found": Score(len(found) / len(outcome.matches), prompts)}


class Drawn:
    """Two pictures, drawn."""

    class Settings(ComponentSettings):
        """There are none."""

    metrics = ("miou",)

    def __init__(self, settings: Settings) -> None: ...

    def pictures(self, count: int | None, seed: int, size: tuple[int, int]) -> Any:
        scene = ten_objects(size)
        if count is not None and count > 3:
            raise InputError(f"--n {count}: there are 3")
        return [BenchPicture(f"drawn-{n}", scene.picture, scene.concepts) for n in range(3)][:count]


class Listed:
    """A text file for each concept, and a list of them."""

    class Settings(ComponentSettings):
        """There are none."""

    def __init__(self, settings: Settings) -> None: ...

    def files(self, extraction: Any) -> Any:
        return ["list.txt", *(f"texts/{self.stem(concept)}.txt" for concept in extraction.concepts)]

    def export(self, extraction: Any, folder: Path) -> None:
        (folder / "texts").mkdir()
        for name in self.files(extraction):
            (folder / name).write_text(self.text(extraction))

    def stem(self, concept: Any) -> str:
        return f"{concept.label}-{concept.index}"

    def text(self, extraction: Any) -> str:
        return " ".join(extraction.tokens)


PLAIN: dict[str, Any] = {
    "retriever": RetrieverUnderTest(OneWord),
    "segmentor": SegmentorUnderTest(Half),
    "proposer": SegmentorUnderTest(Quadrants),
    "learner": LearnerUnderTest(Walk),
    "metric": MetricUnderTest(Found),
    "dataset": DatasetUnderTest(Drawn),
    "exporter": ExporterUnderTest(Listed),
    "attribute": AttributeUnderTest(Attribute("gloss", "gloss", ("matt", "glossy"))),
}


class Dishonest:
    """Says that all jobs are done, or lost; no worker is started."""

    Settings = ExecutorSettings
    wrong = ""

    def __init__(self, settings: ExecutorSettings) -> None:
        pass

    def execute(self, work: Work, jobs: Iterable[int]) -> Generator[JobResult, None, None]:
        if self.wrong == "greedy":
            jobs = list(jobs)
        if self.wrong == "one too many":
            yield JobResult(0, (0, 0))
        for job in jobs:
            if not (self.wrong == "one too few" and job == 3):
                yield JobResult(job, (job * job, 0), "it is lost" if self.wrong == "all lost" else None)


def dishonest(wrong: str) -> ExecutorUnderTest:
    return ExecutorUnderTest(type("Dishonest", (Dishonest,), {"wrong": wrong}))


def changed(which: str, **members: Any) -> Any:
    """A plain component with something else in it."""
    component = PLAIN[which].component
    return dataclasses.replace(PLAIN[which], component=type(component.__name__, (component,), members))


def after(method: str, which: str, change: Callable[[Any], Any]) -> Any:
    """A plain component whose method returns something else."""
    before = getattr(PLAIN[which].component, method)
    return changed(which, **{method: lambda self, *given, **named: change(before(self, *given, **named))})


def failing(method: str, which: str, when: Callable[..., bool], **members: Any) -> Any:
    """A plain component whose method fails when it is given certain things."""
    before = getattr(PLAIN[which].component, method)

    def fail(self: Any, *given: Any, **named: Any) -> Any:
        if when(*given):
            raise ValueError("this cannot be")
        return before(self, *given, **named)

    return changed(which, **{method: fail}, **members)


class Undescribed(ComponentSettings):
    score: float = 0.5


class Rounded(ComponentSettings):
    score: float = Field(0.55, description="of each word")

    @field_serializer("score")
    def _round(self, score: float) -> float:
        return round(score, 1)


class Lax(ComponentSettings, extra="ignore"):
    score: float = Field(0.5, description="of each word")


def attribute(**values: Any) -> AttributeUnderTest:
    given = {"name": "gloss", "anchor": "gloss", "vocabulary": ("matt", "glossy")} | values
    return AttributeUnderTest(Attribute(**given))


class Unknowing:
    """A backbone that knows no word."""

    knows = staticmethod(lambda word: False)


counter = iter(range(10**9))


def is_changed(tensor: torch.Tensor) -> torch.Tensor:
    tensor.zero_()
    return tensor


def drawn_anyhow(learned: Learned) -> Learned:
    return Learned(
        {name: {key: row + torch.rand(1) for key, row in token.items()} for name, token in learned.tokens.items()}
    )


def rows_changed(change: Callable[[torch.Tensor], Any]) -> Callable[[Learned], Learned]:
    return lambda learned: Learned(
        {name: {key: change(row) for key, row in token.items()} for name, token in learned.tokens.items()}
    )


def pictures_with(change: Callable[[BenchPicture], BenchPicture]) -> Callable[[Any], Any]:
    return lambda pictures: [change(one) for one in pictures]


def only_attributes_asked(self: Any, outcome: Any) -> Any:
    return {"found": Score(float(len([one.found.tokens["colour"] for one in outcome.matches if one.found])))}


def refuse(*_: Any) -> None:
    raise InputError("the files are of another picture")


def least(regions: Any) -> int:
    return min(int(region.mask.sum()) for region in regions)


def seen_before(self: Any, view: Any, word: str, generator: torch.Generator) -> Any:
    """A segmentor that keeps what it has seen."""
    self.seen = getattr(self, "seen", 0) + 1
    return view.visible & (torch.arange(view.visible.shape[1]) < self.seen)


def exporting(also: Callable[[Any, Path], object]) -> Any:
    """An exporter that does something else as well."""

    def export(self: Any, extraction: Any, folder: Path) -> None:
        Listed.export(self, extraction, folder)
        also(extraction, folder)

    return changed("exporter", export=export)


def only(right: Callable[[Any], object]) -> Any:
    """An exporter that takes only some runs."""

    def look(extraction: Any, folder: Path) -> None:
        if not right(extraction):
            raise ValueError("this cannot be")

    return exporting(look)


def picture_of(extraction: Any) -> Any:
    return np.asarray(Image.open(extraction.run_dir / "image.png"))


FAULTS: dict[str, tuple[str, Any]] = {
    "no method": ("check_registration", RetrieverUnderTest(Half)),
    "no docstring": ("check_registration", changed("segmentor", __doc__="")),
    "a setting without a description": ("check_settings_have_descriptions", changed("retriever", Settings=Undescribed)),
    "a setting that is rounded": ("check_settings_round_trip", changed("retriever", Settings=Rounded)),
    "any setting": ("check_unknown_settings_are_refused", changed("retriever", Settings=Lax)),
    "words alone": ("check_words", after("retrieve", "retriever", lambda found: [one.word for one in found])),
    "worst first": (
        "check_words",
        after("retrieve", "retriever", lambda found: [Candidate(one.word, n) for n, one in enumerate(found)]),
    ),
    "no number": (
        "check_words",
        after("retrieve", "retriever", lambda found: [Candidate(one.word, float("nan")) for one in found]),
    ),
    "a used word": ("check_used_words", changed("retriever", retrieve=lambda *_: [Candidate("ball", 1.0)])),
    "words by chance": (
        "check_same_view_same_words",
        after("retrieve", "retriever", lambda found: [Candidate(one.word, float(torch.rand(1))) for one in found[:1]]),
    ),
    "a changed view": (
        "check_what_it_is_given",
        changed(
            "retriever", retrieve=lambda self, view, used: [Candidate("ball", float(is_changed(view.pixels).sum()))]
        ),
    ),
    "square alone": (
        "check_two_sided_pictures",
        changed(
            "retriever",
            retrieve=lambda self, view, used: [Candidate("ball", 1.0)][: int((view.pixels.mT + view.pixels).ndim)],
        ),
    ),
    "nothing visible": (
        "check_nothing_visible",
        changed(
            "retriever",
            retrieve=lambda self, view, used: [Candidate("ball", float(view.original[:, view.visible].mean()))],
        ),
    ),
    "no single pixel": ("check_one_pixel", failing("retrieve", "retriever", lambda view, _: view.visible.sum() == 1)),
    "no colour": ("check_one_colour", failing("retrieve", "retriever", lambda view, _: view.original.std() == 0)),
    "two in all": ("check_description", after("describe", "retriever", lambda said: {key: 1.0 for key in said})),
    "words not asked for": ("check_description", after("describe", "retriever", lambda said: {"griffin": 1.0})),
    "a long vector": ("check_vectors", after("embed", "retriever", lambda vector: 2 * vector)),
    "vectors by chance": (
        "check_vectors",
        after("embed", "retriever", lambda vector: torch.nn.functional.normalize(torch.rand(2), dim=0)),
    ),
    "texts elsewhere": (
        "check_vectors",
        changed("retriever", text_encoder=staticmethod(lambda *_: SimpleNamespace(space="another"))),
    ),
    "a soft mask": ("check_masks", after("segment", "segmentor", lambda mask: mask.float())),
    "a batch of masks": ("check_masks", after("segment", "segmentor", lambda mask: mask[None])),
    "what is erased": ("check_masks", after("segment", "segmentor", torch.logical_not)),
    "a width for a height": ("check_two_sided_pictures", after("segment", "segmentor", lambda mask: mask.mT)),
    "masks by chance": (
        "check_same_seed_same_masks",
        after("segment", "segmentor", lambda mask: mask & (torch.rand(mask.shape) < 0.5)),
    ),
    "a memory": ("check_same_seed_same_masks", changed("segmentor", segment=seen_before)),
    "the view's own tensor": (
        "check_what_it_is_given",
        changed("segmentor", segment=lambda self, view, *_: view.visible),
    ),
    "one word of one": (
        "check_any_word",
        changed("segmentor", segment=lambda self, view, word, _: view.visible & ({"ball": True}[word])),
    ),
    "something of nothing": (
        "check_nothing_visible",
        failing("segment", "segmentor", lambda view, *_: not view.visible.any()),
    ),
    "a mask of no pixel": (
        "check_one_pixel",
        failing("segment", "segmentor", lambda view, *_: view.visible.sum() == 1),
    ),
    "masks of no colour": (
        "check_one_colour",
        failing("segment", "segmentor", lambda view, *_: view.original.std() == 0),
    ),
    "nine rounds": (
        "check_ten_rounds",
        failing("segment", "segmentor", lambda view, *_: 1 < view.visible.sum() < 0.01 * view.visible.numel()),
    ),
    "another picture's": ("check_own_picture", changed("segmentor", check_picture=staticmethod(refuse))),
    "masks alone": ("check_masks", after("propose", "proposer", lambda found: [one.mask for one in found])),
    "an empty proposal": (
        "check_masks",
        after("propose", "proposer", lambda found: [Proposal(found[0].mask & found[1].mask)]),
    ),
    "parts that there are not": ("check_parts", changed("learner", parts=("colour",))),
    "fewer tokens": (
        "check_tokens",
        after("learn", "learner", lambda one: Learned(dict(list(one.tokens.items())[1:]))),
    ),
    "more tokens": ("check_tokens", changed("learner", parts=("instance",))),
    "longer rows": ("check_tokens", after("learn", "learner", rows_changed(lambda row: torch.cat([row, row])))),
    "half precision": ("check_tokens", after("learn", "learner", rows_changed(lambda row: row.half()))),
    "a gradient": ("check_tokens", after("learn", "learner", rows_changed(lambda row: row.requires_grad_()))),
    "one row for all": (
        "check_rows_are_the_callers",
        after("learn", "learner", lambda one: Learned(dict.fromkeys(one.tokens, next(iter(one.tokens.values()))))),
    ),
    "a loss that is NaN": ("check_steps", changed("learner", loss=lambda self, step: float("nan"))),
    "tokens by chance": ("check_same_seed_same_tokens", after("learn", "learner", drawn_anyhow)),
    "no seed": (
        "check_another_seed_other_tokens",
        changed("learner", walk=lambda self, rows, generator: Walk.walk(self, rows, torch.Generator().manual_seed(3))),
    ),
    "no resuming": (
        "check_killed_and_resumed",
        changed(
            "learner", restore=lambda self, rows, checkpoint: int((checkpoint.load() or ({}, {"step": 0}))[1]["step"])
        ),
    ),
    "a walk that goes on": (
        "check_killed_and_resumed",
        changed(
            "learner",
            walk=lambda self, rows, generator: Walk.walk(self, rows, self.__dict__.setdefault("own", generator)),
        ),
    ),
    "attributes alone": ("check_no_attributes", failing("learn", "learner", lambda _, __, asked: not asked)),
    "seven attributes": ("check_eight_attributes", failing("learn", "learner", lambda _, __, asked: len(asked) == 8)),
    "nine concepts": ("check_ten_concepts", failing("learn", "learner", lambda _, regions, __: len(regions) == 10)),
    "no hints": (
        "check_no_hints",
        failing("learn", "learner", lambda _, regions, asked: asked and not regions[0].hints),
    ),
    "tokens of a pixel": ("check_one_pixel", failing("learn", "learner", lambda _, regions, __: least(regions) == 1)),
    "tokens of nothing": ("check_empty_mask", failing("learn", "learner", lambda _, regions, __: least(regions) == 0)),
    "tokens of no colour": ("check_one_colour", failing("learn", "learner", lambda image, *_: image.std() == 0)),
    "square pictures": (
        "check_two_sided_pictures",
        failing("learn", "learner", lambda image, *_: image.shape[1] != image.shape[2]),
    ),
    "a changed image": (
        "check_what_it_is_given",
        failing("learn", "learner", lambda image, *_: bool(is_changed(image).any())),
    ),
    "NaN goes on": ("check_nan_is_an_error", changed("learner", loss=lambda self, step: 1.0)),
    "no column": ("check_columns", changed("metric", columns={})),
    "one need as text": ("check_columns", changed("metric", needs="masks")),
    "another column": ("check_scores", after("measure", "metric", lambda scores: {"lost": scores["found"]})),
    "a bare number": ("check_scores", after("measure", "metric", lambda scores: {"found": 1.0})),
    "NaN for None": ("check_scores", after("measure", "metric", lambda scores: {"found": Score(float("nan"))})),
    "no prompts": ("check_prompts", after("measure", "metric", lambda scores: {"found": Score(1.0)})),
    "every part": ("check_parts", changed("metric", measure=only_attributes_asked)),
    "found by all": (
        "check_nothing_found",
        changed("metric", measure=lambda self, outcome: {"found": Score(1 / len(outcome.found))}),
    ),
    "scores by chance": (
        "check_same_outcome_same_scores",
        after("measure", "metric", lambda scores: {"found": Score(float(torch.rand(1)), scores["found"].prompts)}),
    ),
    "one of two": ("check_one_found", failing("measure", "metric", lambda outcome: len(outcome.found) == 1)),
    "three of two": ("check_one_too_many", failing("measure", "metric", lambda outcome: len(outcome.found) == 3)),
    "ten of ten": ("check_ten_concepts", failing("measure", "metric", lambda outcome: len(outcome.found) == 10)),
    "nothing known": (
        "check_no_truth",
        failing("measure", "metric", lambda outcome: not outcome.image.concepts, needs=()),
    ),
    "a pixel found": (
        "check_one_pixel",
        failing("measure", "metric", lambda outcome: min(one.mask.sum() for one in outcome.matches) == 1),
    ),
    "no colour found": (
        "check_one_colour",
        failing("measure", "metric", lambda outcome: outcome.image.pixels.std() == 0),
    ),
    "square pictures measured": (
        "check_two_sided_pictures",
        failing("measure", "metric", lambda outcome: len({*outcome.image.pixels.shape[1:]}) == 2),
    ),
    "a preset's number": ("check_preset", changed("dataset", preset=3)),
    "metrics as text": ("check_metrics", changed("dataset", metrics="miou")),
    "a path for a name": (
        "check_pictures",
        after("pictures", "dataset", pictures_with(lambda one: dataclasses.replace(one, name=f"a/{one.name}"))),
    ),
    "one name": (
        "check_pictures",
        after("pictures", "dataset", pictures_with(lambda one: dataclasses.replace(one, name="picture"))),
    ),
    "masks on their side": (
        "check_two_sided_pictures",
        after(
            "pictures",
            "dataset",
            pictures_with(lambda one: dataclasses.replace(one, concepts=(TrueConcept(one.concepts[0].mask.mT),))),
        ),
    ),
    "the last first": (
        "check_first_pictures",
        changed("dataset", pictures=lambda self, *given: Drawn.pictures(self, None, *given[1:])[-(given[0] or 3) :]),
    ),
    "pictures by chance": (
        "check_same_seed_same_pictures",
        after("pictures", "dataset", pictures_with(lambda one: dataclasses.replace(one, name=f"n-{next(counter)}"))),
    ),
    "fewer than asked for": (
        "check_own_number",
        changed("dataset", pictures=lambda self, count, *given: Drawn.pictures(self, min(count or 3, 3), *given)),
    ),
    "a file elsewhere": ("check_files", after("files", "exporter", lambda names: ["../list.txt", *names])),
    "files as text": ("check_files", after("files", "exporter", lambda names: names[0])),
    "files by chance": ("check_files", after("files", "exporter", lambda names: [f"{next(counter)}.txt"])),
    "a file that is not declared": (
        "check_written_files",
        exporting(lambda _, folder: (folder / "more.txt").write_text("more")),
    ),
    "a file that is not written": (
        "check_written_files",
        exporting(lambda _, folder: (folder / "list.txt").unlink()),
    ),
    "a link for a file": (
        "check_written_files",
        exporting(lambda run, folder: (folder / "link").symlink_to(run.run_dir / "image.png")),
    ),
    "a file beside the folder": (
        "check_written_files",
        exporting(lambda _, folder: (folder.parent / "more.txt").write_text("more")),
    ),
    "no run at all": ("check_written_files", exporting(refuse)),
    "a file in the run": (
        "check_the_run_stays",
        exporting(lambda run, _: (run.run_dir / "more.txt").write_text(str(next(counter)))),
    ),
    "changed tokens": (
        "check_the_run_stays",
        exporting(lambda run, _: [row.add_(1) for own in run.tokens.values() for row in own.values()]),
    ),
    "bytes by chance": ("check_same_run_same_files", changed("exporter", text=lambda *_: f"{next(counter)}")),
    "the run's settings": (
        "check_in_a_run_directory",
        exporting(lambda run, _: (run.run_dir / "settings.toml").write_text("# none")),
    ),
    "samples alone": ("check_no_samples", only(lambda run: (run.run_dir / "samples").is_dir())),
    "two and no fewer": ("check_one_concept", only(lambda run: run.concepts[1])),
    "nine and no more": ("check_ten_concepts", only(lambda run: len(run.concepts) < 10)),
    "labels as names": ("check_one_word_for_all", changed("exporter", stem=lambda self, concept: concept.label)),
    "plain letters": ("check_any_word", only(lambda run: all(one.label.isascii() for one in run.concepts))),
    "always a colour": ("check_no_attributes", only(lambda run: run.concepts[0].tokens["colour"])),
    "seven attributes and no more": ("check_eight_attributes", only(lambda run: len(run.record.attributes) < 8)),
    "always a category": ("check_instance_alone", only(lambda run: run.concepts[0].tokens["category"])),
    "large concepts": ("check_one_pixel", only(lambda run: min(one.mask().sum() for one in run.concepts) > 1)),
    "several colours": ("check_one_colour", only(lambda run: picture_of(run).std() > 0)),
    "square pictures exported": (
        "check_two_sided_pictures",
        only(lambda run: len({*picture_of(run).shape[:2]}) == 1),
    ),
    "a vocabulary of letters": ("check_registration", attribute(vocabulary="matt")),
    "a word twice": ("check_vocabulary", attribute(vocabulary=("matt", "Matt"))),
    "one word": ("check_vocabulary", attribute(vocabulary=("matt",))),
    "the same to the model": ("check_words_can_be_told_apart", attribute(vocabulary=("matt", "MATT"))),
    "no word that is known": (
        "check_backbone_knows_words",
        dataclasses.replace(PLAIN["attribute"], backbone=Unknowing()),
    ),
    "a result of no job": ("check_no_jobs", dishonest("one too many")),
    "a job that is forgotten": ("check_every_job_is_done", dishonest("one too few")),
    "all jobs at once": ("check_jobs_are_taken_as_needed", dishonest("greedy")),
    "no set-up": ("check_set_up_that_fails", dishonest("")),
    "no second try": ("check_lost_workers", dishonest("all lost")),
    "no new worker": ("check_one_worker_that_is_lost", dishonest("all lost")),
    "the instance's name": ("check_token_in_a_prompt", attribute(name="instance")),
}
"""What is wrong -> the check that finds it, and the subject that has it."""


@parametrize_with_checks(list(PLAIN.values()))
def test_a_plain_component_is_right(check: Callable[[Any], None], subject: Any) -> None:
    check(subject)


@pytest.mark.parametrize("wrong", FAULTS)
def test_a_fault_is_found(wrong: str) -> None:
    name, subject = FAULTS[wrong]
    [check] = [one for one in checks_of(subject.kind) if one.__name__ == name]
    result = run_check(check, subject)
    assert result.outcome == "failed", result
    assert result.found and result.holds


def test_every_check_finds_something() -> None:
    common = {check.__name__ for check in components.CHECKS}
    found = {(subject.kind, name) for name, subject in FAULTS.values()}
    assert common <= {name for _, name in found}
    for kind in KINDS:
        checks = checks_of(kind)
        assert len({check.__name__ for check in checks}) == len(checks) >= 5
        assert all(check.__doc__ and check.__doc__.strip() for check in checks)
        if kind != "backbone":  # these have tests of their own
            own = {check.__name__ for check in checks} - common
            assert own <= {name for one, name in found if one == kind} | common


# --- How they are run -------------------------------------------------------------------------------------------------


def test_expected_failures() -> None:
    wrong = after("segment", "segmentor", lambda mask: mask.float())
    why = {"check_masks": "soft masks are what it is for"}
    [mark] = [parametrize_with_checks([wrong], expected_failures=why).mark]
    expected = [one for one in mark.args[1] if one.marks]
    assert [one.id for one in expected] == ["Half-check_masks"]
    assert expected[0].marks[0].kwargs == {"reason": why["check_masks"], "strict": True}
    some = parametrize_with_checks([Half, wrong], expected_failures=lambda subject: why if subject is wrong else {})
    assert len([one for one in some.mark.args[1] if one.marks]) == 1
    with pytest.raises(ValueError, match="there is no check 'check_mask'"):
        parametrize_with_checks([Half], expected_failures={"check_mask": "a slip"})


def test_a_kind_alone() -> None:
    mark = parametrize_with_checks("learner").mark
    assert mark.args[0] == "check"
    assert [one.id for one in mark.args[1]] == [check.__name__ for check in checks_of("learner")]


def test_a_component_of_another_kind() -> None:
    with pytest.raises(TypeError, match="use check_retriever, not check_segmentor"):
        check_segmentor(PLAIN["retriever"])
    with pytest.raises(TypeError, match="BackboneUnderTest"):
        run_checks(type(PLAIN["retriever"].on()))
    assert {result.outcome for result in check_segmentor(Half)} <= {"passed", "skipped"}
