"""Plugins come in through real entry points; broken ones are named and take nothing down."""

import json
from pathlib import Path

import plain_components as plain
import pytest
from icekit_process import icekit, plain_plugin
from plain_components import write_distribution

from icekit import Attribute, InputError, hookimpl
from icekit.plugins import Origin, Plugins, check_attribute, check_component
from icekit.settings import load_settings


@pytest.mark.slow
def test_plugin_of_another_distribution_can_do_all(tmp_path: Path) -> None:
    plugin = plain_plugin(tmp_path / "site")
    write_distribution(
        plugin,
        "shout",
        "import click\nfrom icekit import Attribute, hookimpl\n"
        "@hookimpl\ndef register_commands(cli):\n"
        "    @cli.command()\n    def shout():\n        click.echo('HELLO')\n"
        "@hookimpl\ndef register_attributes(register):\n"
        "    register(Attribute('mood', anchor='mood', vocabulary=('gay', 'sad')))\n"
        "@hookimpl\ndef region_found(region):\n    click.echo(f'FOUND {region.label}', err=True)\n",
        name="icekit-shout",
        version="2.5",
    )
    assert icekit(["shout"], tmp_path, plugin).stdout == "HELLO\n"
    listed = json.loads(icekit(["plugins", "list", "--json"], tmp_path, plugin).stdout)
    assert {
        "kind": "attribute",
        "name": "mood",
        "summary": "anchor 'mood', 2 words",
        "plugin": "shout",
        "distribution": "icekit-shout",
        "version": "2.5",
    } in listed["plugins"]
    kinds = {(one["kind"], one["name"]) for one in listed["plugins"]}
    assert {("learner", "plain"), ("command", "shout"), ("observer", "shout")} <= kinds
    assert [one for one in listed["broken"] if one["plugin"] in ("shout", "plain_plugin")] == []


BROKEN = {
    "no_import": ("import no_such_module_anywhere\n", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    "no_hook": (
        "from icekit import hookimpl\n@hookimpl\ndef register_learner(register):\n    pass\n",
        "unknown hook 'register_learner': did you mean 'register_learners'?",
    ),
    "no_argument": ("from icekit import hookimpl\n@hookimpl\ndef region_found(place):\n    pass\n", "place"),
    "no_class": (
        "from icekit import hookimpl\n@hookimpl\ndef register_learners(register):\n    register('odd', 3)\n",
        "learner 'odd' is not a class but 3",
    ),
    "no_method": (
        "from icekit import hookimpl, ComponentSettings\nclass Odd:\n    class Settings(ComponentSettings): pass\n"
        "@hookimpl\ndef register_learners(register):\n    register('odd', Odd)\n",
        "learner 'odd' (no_method.Odd) lacks learn; see icekit.protocols.Learner",
    ),
    "no_command": (
        "from icekit import hookimpl\n@hookimpl\ndef register_commands(cli):\n    raise KeyError('x')\n",
        "KeyError: 'x'",
    ),
}


def test_broken_plugins_are_named_and_take_nothing_down(tmp_path: Path) -> None:
    plugin = plain_plugin(tmp_path / "site")
    for module, (source, _) in BROKEN.items():
        write_distribution(plugin, module, source, name=f"dist-{module}", version="0.7")
    listing = icekit(["plugins"], tmp_path, plugin)
    assert listing.returncode == 0
    for module, (_, reason) in BROKEN.items():
        [line] = [line for line in listing.stdout.splitlines() if f"plugin '{module}'" in line]
        assert f"plugin '{module}' (dist-{module.replace('_', '_')} 0.7) is broken: " in line
        assert reason in line
    asked = icekit(["plugins", "show", "odd"], tmp_path, plugin)
    assert asked.returncode == 2
    assert asked.stderr.count("\n") == 1
    assert "nothing is called 'odd'" in asked.stderr
    assert "plugin 'no_method' (dist-no_method 0.7) is broken" in asked.stderr


class Nothing:
    """Lacks everything."""


def test_component_checks() -> None:
    from icekit.plugins import PluginError

    check_component("learner", "plain", plain.PlainLearner)
    check_component("backbone", "plain", plain.PlainBackbone)
    for component, message in [
        (3, "not a class"),
        (Nothing, "no nested class Settings"),
        (plain.PlainBackbone, "lacks"),
    ]:
        with pytest.raises(PluginError, match=message):
            check_component("retriever", "odd", component)
    for role, word in (("backbone", "lacks"), ("segmentor", "needs")):
        base = plain.PlainBackbone if role == "backbone" else plain.PlainSegmentor
        with pytest.raises(PluginError, match=f"{word} 'similarty': did you mean 'similarity'"):
            check_component(role, "odd", type("Odd", (base,), {word: ("attention", "similarty")}))
    for attribute in (3, Attribute("category", "x", ()), Attribute("two words", "x", ())):
        with pytest.raises(PluginError):
            check_attribute(attribute)


def test_name_taken_twice_names_both() -> None:
    class Second:
        @hookimpl
        def register_learners(self, register):
            register("plain", plain.PlainLearner)

    plugins = Plugins()
    plugins.add(Origin("first", "one", "1"), lambda: plain)
    plugins.add(Origin("second", "two", "2"), Second)
    assert plugins.offered("learner")["plain"].origin.plugin == "first"
    [broken] = plugins.broken
    assert str(broken) == (
        "plugin 'second' (two 2) is broken: learner 'plain' is already registered by plugin 'first' (one 1): "
        "--no-plugin leaves one of the two out"
    )


def test_a_preset_that_is_not_there_is_named() -> None:
    class Plugin:
        @hookimpl
        def register_backbones(self, register):
            register("odd", type("Odd", (plain.PlainBackbone,), {"preset": "plane"}))

    plugins = Plugins()
    plugins.add(Origin("first", "one", "1"), lambda: plain)
    plugins.add(Origin("second", "two", "2"), Plugin)
    with pytest.raises(
        InputError, match=r"backbone 'odd' comes with a preset that is not there: no preset 'plane': did "
    ):
        plugins.resolve(load_settings(None, ["components.backbone=odd"]))


def test_missing_component_names_the_nearest() -> None:
    plugins = Plugins()
    plugins.add(Origin("first", "one", "1"), lambda: plain)
    with pytest.raises(InputError, match=r"no segmentor 'propsing': did you mean 'proposing'\?"):
        plugins.component("segmentor", "propsing")
    with pytest.raises(InputError, match="no attribute 'colour': there is none"):
        plugins.attribute("colour")
