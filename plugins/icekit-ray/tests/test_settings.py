"""The plugin as icekit meets it when it starts: without Ray, which takes a second to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from icekit.plugins import Origin, Plugins
from icekit.protocols import ExecutorSettings, InputError

HERE = Path(__file__).resolve().parent


@pytest.fixture
def found() -> Plugins:
    import icekit_ray

    plugins = Plugins()
    plugins.add(Origin("ray", "icekit-ray", "0.1.0"), lambda: icekit_ray)
    return plugins


def test_it_is_declared_by_its_place(found: Plugins) -> None:
    offered = found.offered("executor")["ray"]
    assert offered.settings is not None and issubclass(offered.settings, ExecutorSettings)
    assert "Ray cluster" in offered.summary and not found.broken


def test_declaring_it_does_not_import_ray() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import icekit_ray.settings; print('ray' in sys.modules)"
    made = subprocess.run([sys.executable, "-c", code, str(HERE.parent)], capture_output=True, text=True, timeout=60)
    assert made.stdout == "False\n", made.stderr


@pytest.mark.parametrize("address", ["local", "auto", "10.0.0.1:6379", "[::1]:6379", "head.cluster:6379"])
def test_addresses(found: Plugins, address: str) -> None:
    settings = found.component_settings("executor", "ray", {"address": address, "workers": 3})
    assert (settings.address, settings.workers) == (address, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize("address", ["", "10.0.0.1", "ray://10.0.0.1:10001", "10.0.0.1:6379/x", "a b:1"])
def test_what_is_no_address(found: Plugins, address: str) -> None:
    with pytest.raises(InputError, match=r"executor\.address"):
        found.component_settings("executor", "ray", {"address": address})


def test_it_uses_what_icekit_promises_to_plugins() -> None:
    used = set()
    for file in (HERE.parent / "icekit_ray").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "icekit":
                used.add(node.module)
    assert used == {"icekit", "icekit.hookspecs", "icekit.protocols", "icekit.protocols.executing"}
