"""Settings: layers, keys, refusals."""

from pathlib import Path

import pytest
from pydantic import Field

from icekit.plugins import Origin, Plugins
from icekit.protocols import Attribute, ComponentSettings, InputError
from icekit.settings import Settings, flatten, load_settings, parse_assignment


def component(**methods: object) -> type:
    class Component:
        """A component of a test."""

        class Settings(ComponentSettings):
            steps: int = Field(800, ge=1, description="how many")
            rate: float = 5e-4
            model: str | None = None

    for name in ("retrieve", "segment", "learn"):
        setattr(Component, name, lambda self: None)
    return Component


def fake_plugins() -> Plugins:
    """One component for every role, two learners, two attributes."""
    from icekit import hookimpl, protocols

    class Everything(component()):  # type: ignore[misc]
        pass

    for name, value in vars(protocols.Backbone).items():
        if callable(value) and not name.startswith("_"):
            setattr(Everything, name, value)

    class Plugin:
        @hookimpl
        def register_backbones(self, register):
            register("sd21", Everything)

        @hookimpl
        def register_retrievers(self, register):
            register("clip", component())

        @hookimpl
        def register_segmentors(self, register):
            register("xattn", component())

        @hookimpl
        def register_learners(self, register):
            register("ice", component())
            register("other", component())

        @hookimpl
        def register_attributes(self, register):
            register(Attribute("colour", "colour", ("red",), aliases=("color",)))
            register(Attribute("material", "material", ("wood",)))

    plugins = Plugins()
    plugins.add(Origin("fake", "fake", "1"), Plugin)
    assert plugins.broken == []
    return plugins


def test_later_layers_win(tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text("seed = 1\nmax_concepts = 3\nmin_visible = 0.3\n[learner]\nsteps = 10\nrate = 0.1\n")
    settings = load_settings(config, ["max_concepts=4", "learner.steps=20", "seed=2"], {"seed": 5})
    assert (settings.seed, settings.max_concepts, settings.min_visible) == (5, 4, 0.3)
    assert settings.learner == {"steps": 20, "rate": 0.1}


def test_suggestions_come_below_what_was_given() -> None:
    settings = load_settings(None, ["learner.steps=20"])
    suggestions = {"learner.steps": 1, "learner.rate": 0.5, "min_visible": 0.3, "retriever.unheard_of": 1, "samples": 1}
    full = fake_plugins().resolve(settings, suggestions)
    assert full.learner == {"steps": 20, "rate": 0.5, "model": None}
    assert full.min_visible == 0.3
    given = fake_plugins().resolve(load_settings(None, ["min_visible=0.1", "samples=2"]), suggestions)
    assert (given.min_visible, given.samples) == (0.1, 2)  # the defaults too, when somebody gave them


def test_a_suggestion_for_one_component_is_for_that_one_alone() -> None:
    learner = fake_plugins().resolve(load_settings()).components.learner
    suggestions = {f"learner.{learner}.steps": 7, "learner.steps": 1, "learner.another.rate": 0.5, "learner.rate": 0.2}
    full = fake_plugins().resolve(load_settings(), suggestions)
    assert (full.learner["steps"], full.learner["rate"]) == (7, 0.2)
    assert fake_plugins().resolve(load_settings(None, ["learner.steps=20"]), suggestions).learner["steps"] == 20


def test_a_given_setting_may_name_the_component() -> None:
    """As a bench's settings and suggestions do."""
    given = load_settings(None, ["learner.ice.steps=20", "learner.steps=10", "learner.rate=0.1"])
    full = fake_plugins().resolve(given, {"learner.ice.steps": 1, "learner.ice.rate": 0.5})
    assert full.learner == {"steps": 20, "rate": 0.1, "model": None}
    assert full.segmentor == fake_plugins().resolve(load_settings()).segmentor


def test_none_can_be_said(tmp_path: Path) -> None:
    """TOML has no word for it, and a suggestion would stand in its place."""
    suggestions = {"learner.model": "theirs"}
    assert fake_plugins().resolve(load_settings(), suggestions).learner["model"] == "theirs"
    full = fake_plugins().resolve(load_settings(None, ["learner.model=none", "backbone.model=nonesuch"]), suggestions)
    assert (full.learner["model"], full.backbone["model"]) == (None, "nonesuch")
    (tmp_path / "settings.toml").write_text(full.to_toml())
    assert fake_plugins().resolve(load_settings(tmp_path / "settings.toml"), suggestions) == full
    with pytest.raises(InputError, match=r"'learner\.steps' cannot be 'none'"):
        fake_plugins().resolve(load_settings(None, ["learner.steps=none"]))


def test_settings_file_runs_again(tmp_path: Path) -> None:
    plugins = fake_plugins()
    full = plugins.resolve(load_settings(None, ["learner.rate=1e-5", 'attributes=["color", "colour"]']))
    (tmp_path / "settings.toml").write_text(full.to_toml())
    again = plugins.resolve(load_settings(tmp_path / "settings.toml"), {"learner.rate": 1.0, "seed": 7})
    assert again == full
    assert full.attributes == ("colour",)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("learner.steps=400", 400),
        ("learner.rate=5e-4", 5e-4),
        ("learner.on=true", True),
        ('attributes=["a", "b"]', ["a", "b"]),
        ("backbone.model=/models/sd", "/models/sd"),
        ("backbone.model=2024-01-01", "2024-01-01"),
        ("retriever.model=local-dir:/x=y", "local-dir:/x=y"),
        ("backbone.model=", ""),
    ],
)
def test_assignment_values(text: str, value: object) -> None:
    [(key, parsed)] = flatten(parse_assignment(text)).items()
    assert key == text.partition("=")[0]
    assert parsed == value


@pytest.mark.parametrize("text", ["steps", "=4", "learner.=4", ""])
def test_malformed_assignment(text: str) -> None:
    with pytest.raises(InputError, match="KEY=VALUE"):
        parse_assignment(text)


@pytest.mark.parametrize(
    ("assignment", "hint"),
    [
        ("min_visble=0.2", "did you mean 'min_visible'"),
        ("components.learnr=ice", "did you mean 'components.learner'"),
        ("zzz=1", "choose from apart, attributes"),
        ("min_visible=2", "less than 1"),
        ("device=tpu", "'auto', 'cpu', 'cuda' or 'mps'"),
        ("seed=abc", "integer"),
        ("learner=3", "dictionary"),
    ],
)
def test_wrong_setting_is_explained(assignment: str, hint: str) -> None:
    with pytest.raises(InputError) as error:
        load_settings(None, [assignment])
    assert hint in str(error.value)
    assert assignment.partition("=")[0] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("assignment", "hint"),
    [
        ("learner.step=4", "did you mean 'learner.steps'"),
        ("learner.steps=0", "setting 'learner.steps' cannot be 0"),
        ("components.retriever=clp", "did you mean 'clip'"),
        ('attributes=["colur"]', "did you mean 'colour'"),
        ("learner.other.steps=4", "'learner.other' is for learner 'other', and 'ice' is chosen"),
        ("learner.ice.step=4", "did you mean 'learner.steps'"),
        ("learner.ice=4", "'learner.ice' cannot be 4: it should be a table"),
    ],
)
def test_wrong_component_setting_is_explained(assignment: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint):
        fake_plugins().resolve(load_settings(None, [assignment]))


def test_settings_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_settings(tmp_path / "nope.toml")
    with pytest.raises(InputError, match="is a directory"):
        load_settings(tmp_path)
    (tmp_path / "bad.toml").write_text("seed = = 3")
    with pytest.raises(InputError, match="line 1"):
        load_settings(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not TOML"):
        load_settings(tmp_path / "bad.toml")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().seed = 3
