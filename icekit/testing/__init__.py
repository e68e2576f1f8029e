"""The conformance checks of icekit's protocols: what plugin authors import into their own tests.

A backbone of your own is done when these pass on a small model of its family, say a folder of random weights that your
tests write. They need no GPU, and a few seconds for a model of that size::

    import pytest
    from diffusers import StableDiffusionXLPipeline

    from icekit.testing import BackboneUnderTest, backbone_checks
    from my_plugin import MyBackbone


    @pytest.fixture(scope="module")
    def subject(tmp_path_factory):
        folder = write_tiny_model(tmp_path_factory.mktemp("model"))
        return BackboneUnderTest(
            backbone=MyBackbone(MyBackbone.Settings(model=str(folder), steps=2), "cpu"),
            reference=StableDiffusionXLPipeline.from_pretrained(folder),
            encoders={"clip_l": ("tokenizer", "text_encoder"), "clip_g": ("tokenizer_2", "text_encoder_2")},
        )


    @pytest.mark.parametrize("check", backbone_checks())
    def test_my_backbone(check, subject):
        check(subject)

Each check is a function: its name says what it is about, its docstring what must hold, and the message of its
``AssertionError`` what was found. A check that does not apply to the subject (no ``reference`` was handed in, or the
family lacks the capability, see ``icekit.protocols.Capability``) raises ``unittest.SkipTest``, which pytest shows as
skipped. Nothing here needs pytest: ``check_backbone(subject)`` runs them all and returns what came of each.

``reference``, the diffusers pipeline of the same model, makes the strongest checks: the backbone's prediction, picture,
training target, LoRA adapter and saved tokens against those of the pipeline itself. Load it apart from the backbone,
with the scheduler that the backbone samples with; the checks load tokens and adapters into it. How a family differs
from others there (its time, its tokenizers, arguments of its call) is said by ``BackboneUnderTest``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from icekit.testing.subject import BackboneUnderTest, CheckResult

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BackboneUnderTest", "CheckResult", "backbone_checks", "check_backbone"]


def backbone_checks() -> list[Callable[[BackboneUnderTest], None]]:
    """All checks of a backbone, cheap ones first."""
    from icekit.testing import backbone  # torch takes seconds to import

    return list(backbone.CHECKS)


def check_backbone(subject: BackboneUnderTest) -> list[CheckResult]:
    """Run all checks of a backbone; none of them stops the others."""
    from unittest import SkipTest

    results = []
    for check in backbone_checks():
        holds = " ".join((check.__doc__ or "").split())
        try:
            check(subject)
        except SkipTest as reason:
            results.append(CheckResult(check.__name__, holds, "skipped", str(reason)))
        except Exception as error:  # a check that cannot be run has failed
            found = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            results.append(CheckResult(check.__name__, holds, "failed", found))
        else:
            results.append(CheckResult(check.__name__, holds, "passed", ""))
    return results
