"""What the tests of hostile input share."""

from __future__ import annotations

import plain_components as plain
import pytest

from icekit.plugins import Plugins


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    """The built-ins and the plain components."""
    return plain.beside_builtins()
