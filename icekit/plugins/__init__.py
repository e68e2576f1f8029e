"""The plugins: where they come from, what they have registered, and what is wrong with them."""

from icekit.plugins.checking import MAX_NAME_BYTES, RESERVED_TOKENS, PluginError, check_attribute, check_component
from icekit.plugins.data import attributes_from
from icekit.plugins.manager import GROUP, KINDS, Plugins
from icekit.plugins.observers import Observers
from icekit.plugins.registered import BreachError, BrokenPlugin, ComponentError, Declared, Origin, Registered
from icekit.plugins.sources import Choice, choose, chosen, installed, load, own_version

__all__ = [
    "GROUP",
    "KINDS",
    "MAX_NAME_BYTES",
    "RESERVED_TOKENS",
    "BreachError",
    "BrokenPlugin",
    "Choice",
    "ComponentError",
    "Declared",
    "Observers",
    "Origin",
    "PluginError",
    "Plugins",
    "Registered",
    "attributes_from",
    "check_attribute",
    "check_component",
    "choose",
    "chosen",
    "installed",
    "load",
    "own_version",
]
