"""The plugin as icekit finds it: by its entry point."""

from importlib.metadata import entry_points

from icekit.plugins import installed


def test_entry_point():
    [entry] = entry_points(group="icekit", name="texture")
    assert entry.dist.name == "icekit-texture"
    assert entry.value == "icekit_texture"


def test_icekit_has_the_attribute():
    plugins = installed()
    assert [str(broken) for broken in plugins.broken if broken.origin.plugin == "texture"] == []
    texture = plugins.attribute("texture")
    assert texture.anchor == "texture"
    assert {"plain", "striped", "dotted", "checkered"} <= set(texture.vocabulary)
    assert plugins.offered("attribute")["texture"].origin.distribution == "icekit-texture"
