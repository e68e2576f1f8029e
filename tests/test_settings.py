"""Settings: layers, keys, refusals."""

from pathlib import Path

import pytest
from pydantic import Field

from icekit.plugins import Origin, Plugins
from icekit.protocols import Attribute, ComponentSettings, InputError
from icekit.settings import Settings, flatten, load_settings, of_run_before, parse_assignment


def component(**methods: object) -> type:
    class Component:
        """A component of a test."""

        class Settings(ComponentSettings):
            steps: int = Field(800, ge=1, description="how many")
            rate: float = 5e-4
            model: str | None = None

        def __init__(self, settings: object, backbone: object) -> None: ...

    for name in ("retrieve", "segment", "learn"):
        setattr(Component, name, lambda self, *given, **named: None)
    return Component


def fake_plugins(own: Path | None = None, lacks: tuple[str, ...] = (), **needs: object) -> Plugins:
    """One component for every role, two learners, two attributes.

    own: the backbone's preset. lacks: what the backbone cannot do. needs: what learner ``ice`` has of such attributes.
    """
    from icekit import hookimpl, protocols

    class Everything(component()):  # type: ignore[misc]
        pass

    Everything.preset = "own" if own else None
    Everything.lacks = lacks

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
            register("ice", type("Ice", (component(),), needs))
            register("other", component())

        @hookimpl
        def register_attributes(self, register):
            register(Attribute("colour", "colour", ("red",), aliases=("color",)))
            register(Attribute("material", "material", ("wood",)))

        @hookimpl
        def register_presets(self, register):
            if own:
                register("own", own)

    plugins = Plugins()
    plugins.add(Origin("fake", "fake", "1"), Plugin)
    for kind in ("learner", "preset"):
        plugins.offered(kind)
    assert plugins.broken == []
    return plugins


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A backbone's preset."""
    file = tmp_path / "own.toml"
    file.write_text(
        "# What suits this backbone\nmin_visible = 0.3\nsamples = 1\n[learner]\nice.steps = 1\nice.rate = 0.5\n"
        'ice.model = "theirs"\nother.steps = 9\nunheard-of.strange = 1\n'
    )
    return file


def test_later_layers_win(tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text("seed = 1\nmax_concepts = 3\nmin_visible = 0.3\n[learner]\nsteps = 10\nrate = 0.1\n")
    settings = load_settings(config, ["max_concepts=4", "learner.steps=20", "seed=2"], {"seed": 5})
    assert (settings.seed, settings.max_concepts, settings.min_visible) == (5, 4, 0.3)
    assert settings.learner == {"steps": 20, "rate": 0.1}


def test_the_backbones_preset_comes_below_what_was_given(own: Path) -> None:
    full = fake_plugins(own).resolve(load_settings(None, ["learner.steps=20"]))
    assert full.learner == {"steps": 20, "rate": 0.5, "model": "theirs"}
    assert (full.min_visible, full.samples) == (0.3, 1)
    given = fake_plugins(own).resolve(load_settings(None, ["min_visible=0.1", "samples=2"]))
    assert (given.min_visible, given.samples) == (0.1, 2)  # the defaults too, when somebody gave them


def test_a_preset_is_for_the_component_that_it_names(own: Path) -> None:
    """A component of somebody else's may have settings of the same names."""
    full = fake_plugins(own).resolve(load_settings(None, ["components.learner=other"]))
    assert full.learner == {"steps": 9, "rate": 5e-4, "model": None}
    assert full.retriever == fake_plugins().resolve(load_settings()).retriever


def test_a_wrong_line_of_the_backbones_preset_is_named(own: Path) -> None:
    own.write_text("[learner]\nice.stps = 4\n")
    with pytest.raises(InputError, match=r"^preset 'own': unknown setting 'learner.ice.stps': did you mean"):
        fake_plugins(own).resolve(load_settings())
    fake_plugins(own).resolve(load_settings(None, ["components.learner=other"]))
    own.write_text("[learner]\nice.steps = 0\n")
    with pytest.raises(InputError, match=r"^preset 'own': setting 'learner.ice.steps' cannot be 0"):
        fake_plugins(own).resolve(load_settings())


def test_a_given_setting_may_name_the_component(own: Path) -> None:
    """As a bench's settings do."""
    given = load_settings(None, ["learner.ice.steps=20", "learner.steps=10", "learner.rate=0.1"])
    full = fake_plugins(own).resolve(given)
    assert full.learner == {"steps": 20, "rate": 0.1, "model": "theirs"}
    assert full.segmentor == fake_plugins().resolve(load_settings()).segmentor


def test_none_can_be_said(tmp_path: Path, own: Path) -> None:
    """TOML has no word for it, and a preset's value would stand in its place."""
    plugins = fake_plugins(own)
    assert plugins.resolve(load_settings()).learner["model"] == "theirs"
    full = plugins.resolve(load_settings(None, ["learner.model=none", "backbone.model=nonesuch"]))
    assert (full.learner["model"], full.backbone["model"]) == (None, "nonesuch")
    (tmp_path / "settings.toml").write_text(full.to_toml())
    assert plugins.resolve(load_settings(tmp_path / "settings.toml")) == full
    with pytest.raises(InputError, match=r"'learner\.steps' cannot be 'none'"):
        plugins.resolve(load_settings(None, ["learner.steps=none"]))


def test_settings_file_runs_again(tmp_path: Path, own: Path) -> None:
    full = fake_plugins().resolve(load_settings(None, ["learner.rate=1e-5", 'attributes=["color", "colour"]']))
    (tmp_path / "settings.toml").write_text(full.to_toml())
    assert fake_plugins(own).resolve(load_settings(tmp_path / "settings.toml")) == full
    assert full.attributes == ("colour",)


@pytest.mark.parametrize("key", ["rename", "divide", "describe"])
def test_the_flags_that_became_naming(tmp_path: Path, key: str) -> None:
    (tmp_path / "settings.toml").write_text(f"{key} = true\n")
    for arguments in ((tmp_path / "settings.toml",), (None, [f"{key}=false"])):
        with pytest.raises(InputError) as error:
            load_settings(*arguments)
        assert f"there is no setting '{key}' any more: set naming to retrieved (" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["apart", "reuse"])
def test_the_flags_that_became_same_word(key: str) -> None:
    with pytest.raises(InputError) as error:
        load_settings(None, [f"{key}=true"])
    assert f"there is no setting '{key}' any more: set same_word to apart (" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("apart", "now"), [(False, "once"), (True, "parts")])
def test_the_settings_of_a_run_of_before_are_read(apart: bool, now: str) -> None:
    values = of_run_before({"apart": apart, "reuse": "never", "seed": 3})
    assert values == {"image": {"fit": "square"}, "same_word": now, "seed": 3}
    assert Settings.model_validate(values).same_word == now
    today = Settings(same_word="apart").model_dump(mode="json")
    assert of_run_before(today) == today


# --- What a backbone lacks -------------------------------------------------------------------------------------------


def test_what_the_backbone_lacks_is_said_before_it_is_loaded() -> None:
    needing = {"needs": ("attention", "similarity")}
    fake_plugins(lacks=("fine_tuning",), **needing).resolve(load_settings())
    plugins = fake_plugins(lacks=("similarity",), **needing)
    with pytest.raises(InputError) as error:
        plugins.resolve(load_settings())
    assert str(error.value) == (
        "learner 'ice' needs similarity (maps of places over places), which backbone 'sd21' does not have: "
        "choose other or take another backbone"
    )
    plugins.resolve(load_settings(None, ["components.learner=other"]))


def test_a_need_may_depend_on_settings() -> None:
    def needs(settings) -> list[str]:
        return ["fine_tuning"] if settings.steps > 800 else []

    plugins = fake_plugins(lacks=("fine_tuning", "posterior"), needs_with=staticmethod(needs))
    plugins.resolve(load_settings())
    with pytest.raises(InputError, match=r"'ice' needs fine_tuning \(weights .*: set it otherwise or choose other or"):
        plugins.resolve(load_settings(None, ["learner.steps=801"]))


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
        ("zzz=1", "choose from attribute, attributes, backbone"),
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


def test_a_wrong_value_names_the_file_it_is_in(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("seed = 2020-01-01\n")
    with pytest.raises(InputError, match=r"^settings file .*mine\.toml: setting 'seed' cannot be datetime"):
        load_settings(file, ["seed=1"])
    with pytest.raises(InputError, match="'samples' cannot be True"):
        load_settings(None, ["samples=true"], {"samples": 2})


def test_a_preset_has_a_name() -> None:
    with pytest.raises(InputError, match="'preset' cannot be ''"):
        load_settings(None, (), {"preset": ""})
