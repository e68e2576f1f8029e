"""Running the conformance checks: all at once, or one by one as tests of pytest's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast, get_args
from unittest import SkipTest

from icekit.testing.subjects import CheckResult, Kind, Subject, as_subject

if TYPE_CHECKING:
    import pytest

Check = Callable[[Any], None]
"""A check: its name says what it is about, its docstring what must hold, its AssertionError what was found."""
ExpectedFailures = Mapping[str, str] | Callable[[Any], Mapping[str, str]]
"""Names of checks that a component is known to fail, and why; or a function of the subject that gives them."""

KINDS: tuple[Kind, ...] = get_args(Kind)
"""All kinds that there are checks for."""
_HOMES: Mapping[Kind, str] = {
    "attribute": "attributes",
    "retriever": "retrievers",
    "segmentor": "segmentors",
    "learner": "learners",
    "backbone": "backbone",
    "metric": "metrics",
    "dataset": "datasets",
    "exporter": "exporters",
    "executor": "executors",
}


def checks_of(kind: Kind) -> list[Check]:
    """All checks of a kind of component, cheap ones first.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in _HOMES:
        raise ValueError(f"there are no checks of {kind!r}: choose from {', '.join(_HOMES)}")
    return list(import_module(f"icekit.testing.{_HOMES[kind]}").CHECKS)  # torch takes seconds to import


def run_checks(given: Any, kind: Kind | None = None) -> list[CheckResult]:
    """Run all checks of a component; none of them stops the others.

    Args:
        given: a subject, an attribute, or a class of components.
        kind: what it must be; None: its methods tell.
    """
    subject = as_subject(given, kind)
    return [run_check(check, subject) for check in checks_of(subject.kind)]


def run_check(check: Check, subject: Subject) -> CheckResult:
    """Run one check, and say what came of it."""
    holds = " ".join((check.__doc__ or "").split())
    try:
        check(subject)
    except SkipTest as reason:
        return CheckResult(check.__name__, holds, "skipped", str(reason))
    except Exception as error:  # a check that cannot be run has failed
        found = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        return CheckResult(check.__name__, holds, "failed", found)
    return CheckResult(check.__name__, holds, "passed", "")


def parametrize_with_checks(
    given: Kind | Sequence[Any], *, expected_failures: ExpectedFailures | None = None
) -> pytest.MarkDecorator:
    """Make one test a check of a test function, in the manner of scikit-learn's decorator of this name::

        @parametrize_with_checks([MySegmentor, SegmentorUnderTest(MySegmentor, {"sharp": True})])
        def test_conformance(check, subject):
            check(subject)

    A check that is expected to fail is an ``xfail(strict=True)``: when it passes one day, the test fails and says so.

    Args:
        given: subjects, attributes and classes of components; or the name of a kind, and then the test is handed the
            checks alone: ``subject`` is a fixture of yours, for a model that takes a while to load, say.
        expected_failures: names of checks and why they fail; or a function of the subject (of the kind, where only
            that is given) that gives them.

    Raises:
        ValueError: an expected failure of a check that there is not.
    """
    import pytest

    subjects = [] if isinstance(given, str) else [as_subject(one) for one in given]
    kinds = {cast("Kind", given)} if isinstance(given, str) else {subject.kind for subject in subjects}
    known = {check.__name__ for kind in sorted(kinds) for check in checks_of(kind)}

    def marks(check: Check, subject: Any) -> Collection[pytest.MarkDecorator]:
        expected = expected_failures(subject) if callable(expected_failures) else expected_failures or {}
        if unknown := sorted(expected.keys() - known):
            raise ValueError(f"expected_failures: there is no check {unknown[0]!r}: {', '.join(sorted(known))}")
        why = expected.get(check.__name__)
        return [] if why is None else [pytest.mark.xfail(reason=why, strict=True)]

    if isinstance(given, str):
        checks = checks_of(cast("Kind", given))
        return pytest.mark.parametrize(
            "check", [pytest.param(check, marks=marks(check, given), id=check.__name__) for check in checks]
        )
    return pytest.mark.parametrize(
        ("subject", "check"),
        [
            pytest.param(subject, check, marks=marks(check, subject), id=f"{subject.label}-{check.__name__}")
            for subject in subjects
            for check in checks_of(subject.kind)
        ],
    )
