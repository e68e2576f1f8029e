"""The conformance checks of icekit's protocols: what plugin authors import into their own tests.

A component is done when these pass::

    from icekit.testing import parametrize_with_checks
    from my_plugin import MySegmentor


    @parametrize_with_checks([MySegmentor])
    def test_conformance(check, subject):
        check(subject)

That is all it takes for a retriever, a segmentor, a learner, a metric, a data set, an exporter, an executor or an
attribute: they are checked on a backbone of random weights and on pictures that are drawn here (``tiny``, ``scenes``),
without a GPU or a download.
Other settings, or another backbone, are said by a ``...UnderTest``, as in
``SegmentorUnderTest(MySegmentor, {"sharp": True})``.

What a component is known to fail is said with a reason, and then is an ``xfail`` that must fail::

    @parametrize_with_checks([MyLearner], expected_failures={"check_ten_concepts": "one prompt holds five"})

Each check is a function: its name says what it is about, its docstring what must hold, and the message of its
``AssertionError`` what was found and what should be. A check that does not apply raises ``unittest.SkipTest``, which
pytest shows as skipped. pytest is needed by the decorator alone: ``check_segmentor(MySegmentor)`` and its companions
run all checks of a kind and return what came of each.

A backbone is checked on a small model of its family, say a folder of random weights that your tests write::

    @pytest.fixture(scope="module")
    def subject(tmp_path_factory):
        folder = write_tiny_model(tmp_path_factory.mktemp("model"))
        return BackboneUnderTest(
            backbone=MyBackbone(MyBackbone.Settings(model=str(folder), steps=2), "cpu"),
            reference=StableDiffusionXLPipeline.from_pretrained(folder),
            encoders={"clip_l": ("tokenizer", "text_encoder"), "clip_g": ("tokenizer_2", "text_encoder_2")},
        )


    @parametrize_with_checks("backbone")
    def test_my_backbone(check, subject):
        check(subject)

``reference``, the diffusers pipeline of the same model, makes the strongest checks: the backbone's prediction, picture,
training target, LoRA adapter and saved tokens against those of the pipeline itself. Load it apart from the backbone,
with the scheduler that the backbone samples with; the checks load tokens and adapters into it. How a family differs
from others there (its time, its tokenizers, arguments of its call) is said by ``BackboneUnderTest``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from icekit.testing.running import KINDS, checks_of, parametrize_with_checks, run_check, run_checks
from icekit.testing.subjects import (
    AttributeUnderTest,
    BackboneUnderTest,
    CheckResult,
    DatasetUnderTest,
    ExecutorUnderTest,
    ExporterUnderTest,
    LearnerUnderTest,
    MetricUnderTest,
    RetrieverUnderTest,
    SegmentorUnderTest,
)

if TYPE_CHECKING:
    from icekit.protocols import Attribute

__all__ = [
    "KINDS",
    "AttributeUnderTest",
    "BackboneUnderTest",
    "CheckResult",
    "DatasetUnderTest",
    "ExecutorUnderTest",
    "ExporterUnderTest",
    "LearnerUnderTest",
    "MetricUnderTest",
    "RetrieverUnderTest",
    "SegmentorUnderTest",
    "check_attribute",
    "check_backbone",
    "check_dataset",
    "check_executor",
    "check_exporter",
    "check_learner",
    "check_metric",
    "check_retriever",
    "check_segmentor",
    "checks_of",
    "parametrize_with_checks",
    "run_check",
    "run_checks",
]


def check_attribute(subject: Attribute | AttributeUnderTest) -> list[CheckResult]:
    """Run all checks of an attribute; none of them stops the others."""
    return run_checks(subject, "attribute")


def check_retriever(subject: type | RetrieverUnderTest) -> list[CheckResult]:
    """Run all checks of a retriever; none of them stops the others."""
    return run_checks(subject, "retriever")


def check_segmentor(subject: type | SegmentorUnderTest) -> list[CheckResult]:
    """Run all checks of a segmentor; none of them stops the others."""
    return run_checks(subject, "segmentor")


def check_learner(subject: type | LearnerUnderTest) -> list[CheckResult]:
    """Run all checks of a learner; none of them stops the others."""
    return run_checks(subject, "learner")


def check_backbone(subject: BackboneUnderTest) -> list[CheckResult]:
    """Run all checks of a backbone; none of them stops the others."""
    return run_checks(subject, "backbone")


def check_metric(subject: type | MetricUnderTest) -> list[CheckResult]:
    """Run all checks of a metric; none of them stops the others."""
    return run_checks(subject, "metric")


def check_dataset(subject: type | DatasetUnderTest) -> list[CheckResult]:
    """Run all checks of a data set; none of them stops the others."""
    return run_checks(subject, "dataset")


def check_exporter(subject: type | ExporterUnderTest) -> list[CheckResult]:
    """Run all checks of an exporter; none of them stops the others."""
    return run_checks(subject, "exporter")


def check_executor(subject: type | ExecutorUnderTest) -> list[CheckResult]:
    """Run all checks of an executor; none of them stops the others."""
    return run_checks(subject, "executor")
