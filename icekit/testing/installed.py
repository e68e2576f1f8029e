"""The conformance checks of what is installed, by its name: what ``icekit plugins check`` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from icekit.foreign import Ended, aside, guarded
from icekit.paths import PREFIX
from icekit.plugins import Plugins, Registered
from icekit.protocols import InputError
from icekit.testing import subjects
from icekit.testing.running import KINDS, checks_of, run_check
from icekit.testing.scenes import two_objects
from icekit.testing.subjects import AttributeUnderTest, BackboneUnderTest, CheckResult, Subject


def check_installed(found: Plugins, one: Registered, values: Mapping[str, Any]) -> Iterator[CheckResult]:
    """Run all checks of an installed component, attribute or preset; each result when it is there.

    values: a component's settings, as in a settings file.

    Raises:
        InputError: it cannot be checked with these settings; the message says what is needed.
    """
    if one.settings is None and values:
        raise InputError(f"{one.role} {one.name!r} has no settings: leave out --set")
    if one.role == "preset":
        says = "Every setting is one of the component that it names, and all of these are installed."
        yield _passes("check_preset", says, lambda: found.check_preset(one.name))
        return
    if one.settings is not None:
        found.component_settings(one.role, one.name, values)
    says = "It can be imported, and has what its protocol asks for."
    imported = _passes("check_import", says, lambda: one.value)
    yield imported
    if imported.outcome == "failed":
        return
    if one.role not in KINDS:
        raise InputError(f"there are no checks of {one.role}s: choose one of another kind, {', '.join(KINDS)}")
    with aside():
        subject = _subject(found, one, values)
        checks = checks_of(subject.kind)
    for check in checks:
        with aside():
            try:
                with guarded():
                    result = run_check(check, subject)
            except Ended as error:  # it tried to end the program
                result = CheckResult(check.__name__, " ".join((check.__doc__ or "").split()), "failed", str(error))
        yield result


def _passes(name: str, holds: str, check: Callable[[], object]) -> CheckResult:
    try:
        with aside():
            check()
    except InputError as error:
        return CheckResult(name, holds, "failed", str(error))
    return CheckResult(name, holds, "passed", "")


def _subject(found: Plugins, one: Registered, values: Mapping[str, Any]) -> Subject:
    if one.role == "attribute":
        return AttributeUnderTest(one.given)
    whose = f"{one.role} {one.name!r}"
    with found.naming("load", [(one.role, one.name)], by=(one.role, one.name)):
        try:
            if one.role == "backbone":
                return _backbone(found, one, values)
            kinds = {made.kind: made for made in vars(subjects).values() if hasattr(made, "kind")}
            subject = kinds[one.role](one.value, values, one.name)
            if isinstance(subject, subjects.OnBackbone):
                subject.build(two_objects())
            return cast("Subject", subject)
        except InputError as error:
            raise InputError(f"{whose} cannot be checked so: {error}; --set gives other settings") from error


def _backbone(found: Plugins, one: Registered, values: Mapping[str, Any]) -> BackboneUnderTest:
    """On the CPU, without the reference, which the plugin's own tests have."""
    import torch

    field = one.settings.model_fields.get("model") if one.settings is not None else None
    if field is not None and "model" not in values and not str(field.default).startswith(PREFIX):
        raise InputError(
            f"its own model, {field.default}, is large, and the checks need a small one of its family, on the CPU: the "
            "plugin's own tests have one; or give a folder, --set model=FOLDER"
        )
    settings = found.component_settings("backbone", one.name, values)
    return BackboneUnderTest(one.value(settings, torch.device("cpu")))
