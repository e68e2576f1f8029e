"""The conformance checks of components, on all that icekit brings and on its own plugins."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import icekit_neighbours
import icekit_texture
import pytest
from icekit_tabletop import plugin as tabletop_plugin
from icekit_tabletop.dataset import TabletopDataset
from icekit_tabletop.world import SHAPES

from icekit import builtin
from icekit.plugins import Origin, Plugins
from icekit.testing import (
    KINDS,
    DatasetUnderTest,
    ExporterUnderTest,
    LearnerUnderTest,
    MetricUnderTest,
    RetrieverUnderTest,
    SegmentorUnderTest,
    parametrize_with_checks,
)
from icekit.testing.scenes import NOUNS, Scene, to_mask_picture, two_objects


def registered(plugin: Any, role: str) -> dict[str, Any]:
    """What a plugin registers of one kind, by name; what it declares is imported."""
    plugins = Plugins()
    plugins.add(Origin(plugin.__name__, plugin.__name__, "0"), lambda: plugin)
    found = {name: one.value for name, one in plugins.offered(role).items()}
    assert not plugins.broken
    return found


@functools.cache
def temporary() -> tempfile.TemporaryDirectory[str]:
    """Goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="icekit-conformance-")


def folder() -> Path:
    """A folder for this process."""
    return Path(temporary().name)


@functools.cache
def clip() -> str:
    from icekit.testing.tiny import write_clip

    return str(write_clip(folder() / "clip"))


@functools.cache
def dino() -> str:
    from icekit.testing.tiny import write_dino

    return str(write_dino(folder() / "dino"))


def with_clip(**values: Any) -> Callable[[Scene], Mapping[str, Any]]:
    return lambda scene: {"model": clip(), "vocabulary": NOUNS, "background": (), "max_similarity": 1.0, **values}


def mask_files(scene: Scene, **values: Any) -> Mapping[str, Any]:
    files = []
    for place, concept in enumerate(scene.concepts):
        files.append(Path(tempfile.mkdtemp(dir=folder())) / f"{place}.png")
        to_mask_picture(concept.mask).save(files[-1])
    return {"files": files, **values}


def pictures_in_a_folder(scene: Scene) -> Mapping[str, Any]:
    root = Path(tempfile.mkdtemp(dir=folder()))
    for place in range(3):
        size = (80, 80)
        drawn = two_objects(size)
        (root / f"scene-{place}").mkdir()
        drawn.picture.save(root / f"scene-{place}" / "photo.png")
        (root / f"scene-{place}" / "masks").mkdir()
        for number, concept in enumerate(drawn.concepts):
            to_mask_picture(concept.mask).save(root / f"scene-{place}" / "masks" / f"{number}-{concept.word}.png")
    return {"path": root}


RETRIEVERS = registered(builtin, "retriever")
SEGMENTORS = registered(builtin, "segmentor")
LEARNERS = registered(builtin, "learner")
METRICS = registered(builtin, "metric")
DATASETS = registered(builtin, "dataset")
EXPORTERS = registered(builtin, "exporter")
NEIGHBOURS = registered(icekit_neighbours, "learner")
QUICK = {"draws": 1}
SPLIT = {"steps": 3, "split_share": 0.5, "split_tokens": 2}
PRIOR = {"prior_images": 1, "backgrounds": 2}

BUILTINS: list[Any] = [
    *registered(builtin, "attribute").values(),
    RetrieverUnderTest(RETRIEVERS["words"], {"words": ("cup", "ball", "Ball")}, "words"),
    RetrieverUnderTest(RETRIEVERS["clip"], with_clip(), "clip"),
    RetrieverUnderTest(RETRIEVERS["splice"], with_clip(image_mean="none", l1_penalty=0.02), "splice"),
    SegmentorUnderTest(SEGMENTORS["xattn"], QUICK, "xattn"),
    SegmentorUnderTest(SEGMENTORS["xattn"], {**QUICK, "one_piece": True, "threshold": "otsu"}, "xattn-one-piece"),
    SegmentorUnderTest(SEGMENTORS["diffseg"], QUICK, "diffseg"),
    SegmentorUnderTest(SEGMENTORS["diffseg"], {**QUICK, "erase_with": ["background"]}, "diffseg-erasing"),
    SegmentorUnderTest(SEGMENTORS["masks"], mask_files, "masks"),
    LearnerUnderTest(LEARNERS["ice"], {}, "ice"),
    LearnerUnderTest(
        LEARNERS["ice"],
        {
            "word_steps": 1,
            "word_draws": 1,
            "steps": 2,
            "attribute_rows": "words",
            "refine_steps": 1,
            "refine_rows": "attributes",
            "prior_images": 1,
            "close_ups": 1,
        },
        "ice-all-phases",
    ),
    LearnerUnderTest(LEARNERS["words"], {}, "words"),
    LearnerUnderTest(LEARNERS["described"], {}, "described"),
    LearnerUnderTest(LEARNERS["random"], {}, "random"),
    *(
        MetricUnderTest(METRICS[name], {}, name)
        for name in ("miou", "mask_recall", "mask_precision", "recall", "word_accuracy")
    ),
    *(
        MetricUnderTest(METRICS[name], lambda scene: {"clip": clip()}, name)
        for name in ("sim_i", "sim_c", "acc1", "acc3", "attribute_clip")
    ),
    *(
        MetricUnderTest(METRICS[name], lambda scene: {"dino": dino()}, name)
        for name in ("sim_i_dino", "sim_c_dino", "acc1_dino", "acc3_dino")
    ),
    DatasetUnderTest(DATASETS["folder"], pictures_in_a_folder, "folder"),
    DatasetUnderTest(DATASETS["uce"], pictures_in_a_folder, "uce"),
    ExporterUnderTest(EXPORTERS["report"], {"image_side": 300}, "report"),
    *(ExporterUnderTest(EXPORTERS[name], {}, name) for name in ("diffusers", "a1111", "comfyui", "invokeai")),
]
PLUGINS: list[Any] = [
    *registered(icekit_texture, "attribute").values(),
    SegmentorUnderTest(registered(icekit_neighbours, "segmentor")["conceptexpress"], QUICK, "conceptexpress-masks"),
    LearnerUnderTest(NEIGHBOURS["textual-inversion"], {"backgrounds": 2}, "textual-inversion"),
    LearnerUnderTest(NEIGHBOURS["dreambooth"], {**PRIOR, "steps": 2}, "dreambooth"),
    LearnerUnderTest(NEIGHBOURS["dreambooth"], {**PRIOR, "weights": "all", "steps": 2}, "dreambooth-all"),
    LearnerUnderTest(NEIGHBOURS["break-a-scene"], {"prior_images": 1}, "break-a-scene"),
    LearnerUnderTest(
        NEIGHBOURS["conceptexpress"], {"steps": 3, "split_share": 0.5, "split_tokens": 2}, "conceptexpress"
    ),
    LearnerUnderTest(NEIGHBOURS["hyperexpress"], {}, "hyperexpress"),
    *(
        MetricUnderTest(metric, {}, name, words=tuple(SHAPES))
        for name, metric in registered(tabletop_plugin, "metric").items()
    ),
    DatasetUnderTest(TabletopDataset, {}, "tabletop"),
]


@parametrize_with_checks(BUILTINS)
def test_builtin(check: Callable[[Any], None], subject: Any) -> None:
    check(subject)


@parametrize_with_checks(PLUGINS)
def test_plugin(check: Callable[[Any], None], subject: Any) -> None:
    check(subject)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("attribute", "backbone", "executor")])
def test_all_of_them_are_here(kind: str) -> None:
    checked = {subject.component for subject in (*BUILTINS, *PLUGINS) if getattr(subject, "kind", "") == kind}
    there = {
        component
        for plugin in (builtin, icekit_neighbours, tabletop_plugin)
        if hasattr(plugin, f"register_{kind}s")
        for component in registered(plugin, kind).values()
    }
    assert checked == there
