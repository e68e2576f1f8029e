"""Checks that hold for every component that is a class: that it can be registered, and its settings."""

from __future__ import annotations

import tempfile
from pathlib import Path

from icekit.protocols import InputError
from icekit.settings import ROLES, Settings, load_settings, validate
from icekit.testing.scenes import two_objects
from icekit.testing.subjects import ComponentUnderTest


def check_registration(subject: ComponentUnderTest) -> None:
    """It can be registered: a class with a nested ``Settings``, and every method with its protocol's arguments."""
    from icekit.plugins import PluginError, check_component

    try:
        check_component(subject.kind, subject.label, subject.component)
    except PluginError as error:
        raise AssertionError(str(error)) from error
    assert (subject.component.__doc__ or "").strip(), (
        f"{subject.component.__name__} has no docstring: its first line is what `icekit plugins` says of it"
    )


def check_settings_have_descriptions(subject: ComponentUnderTest) -> None:
    """Every setting says what it is: ``Field(..., description=...)`` is its help."""
    fields = subject.component.Settings.model_fields  # type: ignore[attr-defined]
    silent = [name for name, field in fields.items() if not (field.description or "").strip()]
    assert not silent, f"settings without a description: {', '.join(silent)}"


def check_settings_round_trip(subject: ComponentUnderTest) -> None:
    """Settings that are written to a run's JSON or to a settings file are read back the same."""
    settings = subject.settings_for(two_objects())
    model, written = type(settings), settings.model_dump(mode="json")
    read = validate(model, written)
    assert read == settings, f"written to JSON and read back, {settings!r} has become {read!r}"
    # A settings file has tables for the roles alone; what another kind has is put into one of them.
    role = subject.kind if subject.kind in ROLES else "learner"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.toml"
        file.write_text(Settings.model_validate({role: written}).to_toml(), encoding="utf-8")
        values = getattr(load_settings(file), role)
    read = validate(model, values)
    assert read == settings, f"written to a settings file and read back, {settings!r} has become {read!r}"


def check_unknown_settings_are_refused(subject: ComponentUnderTest) -> None:
    """A setting that there is not is refused by name."""
    model = subject.component.Settings  # type: ignore[attr-defined]
    try:
        validate(model, {"no_such_setting": 1})
    except InputError as error:
        assert "no_such_setting" in str(error), f"the message does not name the setting: {error}"
        return
    raise AssertionError(
        "Settings takes a setting that there is not: it must be a subclass of icekit.ComponentSettings"
    )


CHECKS = (
    check_registration,
    check_settings_have_descriptions,
    check_settings_round_trip,
    check_unknown_settings_are_refused,
)
"""Checks that come first for each kind."""
