"""``icekit plugins new``: a new plugin as a complete distribution, ready to be installed, tested and changed.

What is written comes from ``templates``: ``common`` for every kind, and a folder a kind with its module (``module.py``,
and ``init.py`` and ``settings.py`` where the module is too heavy to be imported whenever icekit starts), its tests and
how it is used.
"""

from __future__ import annotations

import keyword
import os
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from icekit.protocols import VERSION, InputError

if TYPE_CHECKING:
    import jinja2

    from icekit.plugins import Plugins


@dataclass(frozen=True)
class Kind:
    """A kind of plugin.

    description: one line, of what the template does, in the plugin's README and metadata.
    dependencies: distributions that the module needs beside icekit.
    is_heavy: importing the module imports torch, and so its hook is in a module of its own.
    """

    description: str
    dependencies: tuple[str, ...] = ()
    is_heavy: bool = False


KINDS = {
    "attribute": Kind("One more intrinsic attribute for icekit"),
    "retriever": Kind("A retriever for icekit: it asks the text-to-image model which words fit"),
    "segmentor": Kind("A segmentor for icekit: superpixels, without any model", ("scikit-image>=0.26",)),
    "learner": Kind("A learner for icekit: one token a concept", is_heavy=True),
    "backbone": Kind("A backbone for icekit: Stable Diffusion in one style", is_heavy=True),
    "metric": Kind("A metric for icekit: do pictures made with a concept's tokens have its colours?"),
    "dataset": Kind("A data set for icekit: pictures, masks and words from a table", ("pillow",)),
    "exporter": Kind("An exporter for icekit: each concept of a run, cut out of the picture", ("pillow",)),
    "executor": Kind("An executor for icekit: processes that talk through pipes"),
    "command": Kind("A command for icekit: the concepts of a run, a line each", ("click>=8.1",)),
    "observer": Kind("An observer for icekit: how long each stage of a run took", ("click>=8.1",)),
}
"""All kinds of plugins that can be written, by name."""

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
LONGEST_NAME = 24


def write_plugin(name: str, kind: str, folder: Path) -> list[Path]:
    """Write a complete distribution ``icekit-<name>`` with one plugin; all of it or nothing.

    Args:
        name: what people will type, see ``check_name``.
        kind: one of ``KINDS``.
        folder: absent or empty; nothing is overwritten.

    Returns:
        The files, in the order of their names.

    Raises:
        InputError: the name or the kind cannot be, the folder is not empty or cannot be written to.
    """
    check_name(name, kind)
    texts, folder = render_plugin(name, kind), folder.absolute()
    is_there = os.path.lexists(folder)
    half_written = (folder if is_there else folder.parent) / f".{folder.name}.{os.getpid()}.part"
    try:
        if is_there and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(f"{folder} is there already, and no empty folder: choose another one with --out")
        for path, text in texts.items():
            (half_written / path).parent.mkdir(parents=True, exist_ok=True)
            (half_written / path).write_text(text, encoding="utf-8", newline="\n")
        if is_there:  # it may be somebody's working directory, and stays itself
            for one in half_written.iterdir():
                one.rename(folder / one.name)
        else:
            half_written.rename(folder)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {(error.strerror or str(error)).lower()}") from error
    finally:
        shutil.rmtree(half_written, ignore_errors=True)
    return [folder / path for path in sorted(texts)]


def check_name(name: str, kind: str, installed: Plugins | None = None) -> None:
    """Whether a new plugin of this kind can be called so.

    installed: where the name must not be taken; None: it is not looked up.

    Raises:
        InputError: it cannot.
    """
    if kind not in KINDS:
        raise InputError(f"no kind of plugin is called {kind!r}: choose from {', '.join(KINDS)}")
    _check_form(name, kind)
    if installed is not None:
        _check_free(name, kind, installed)


def _check_form(name: str, kind: str) -> None:
    from icekit.plugins import RESERVED_TOKENS

    words = "lower-case letters and digits, a letter first" + ("" if kind == "attribute" else ", words joined by -")
    if not NAME.fullmatch(name) or len(name) > LONGEST_NAME or (kind == "attribute" and "-" in name):
        raise InputError(f"{name!r} cannot be the name of {a(kind)}: use {words}, at most {LONGEST_NAME}, as in gloss")
    if keyword.iskeyword(name) or keyword.issoftkeyword(name) or name in ("none", "true", "false", "icekit"):
        raise InputError(f"{name!r} cannot be the name of {a(kind)}: it means something else in Python or in settings")
    if kind == "attribute" and name in RESERVED_TOKENS:
        raise InputError(f"{name!r} cannot be an attribute's name: every concept has such a token or sample already")


def _check_free(name: str, kind: str, installed: Plugins) -> None:
    distribution, module = f"icekit-{name}", _module(name)
    try:
        raise InputError(f"{distribution} {version(distribution)} is installed already: choose another name")
    except PackageNotFoundError:
        pass
    if find_spec(module) is not None:
        raise InputError(f"there is a module {module} already: choose another name than {name!r}")
    if installed.manager.has_plugin(name):
        raise InputError(f"there is a plugin {name!r} already: choose another name")
    if kind in ("command", "observer"):
        return
    for one in installed.offered(kind).values():
        if name == one.name or name in getattr(one.given, "aliases", ()):
            raise InputError(f"{kind} {name!r} is already registered by {one.origin}: choose another name")
        if kind == "metric" and _identifier(name) in one.value.columns:
            raise InputError(f"metric {one.name!r} of {one.origin} has a column {name!r}: choose another name")


def a(kind: str) -> str:
    """A kind with its article."""
    return f"{'an' if kind[0] in 'aeio' else 'a'} {kind}"


def _identifier(name: str) -> str:
    return name.replace("-", "_")


def _module(name: str) -> str:
    return f"icekit_{_identifier(name)}"


def render_plugin(name: str, kind: str) -> dict[str, str]:
    """The files of a plugin: path in its folder -> text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("icekit.scaffold"),
        autoescape=False,  # what is written is Python, TOML and Markdown
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    one, module = KINDS[kind], _module(name)
    words: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "a_kind": a(kind),
        "description": one.description,
        "dependencies": ("icekit", *one.dependencies),
        "is_package": one.is_heavy,
        "distribution": f"icekit-{name}",
        "module": module,
        "identifier": _identifier(name),
        "Name": "".join(part.capitalize() for part in name.split("-")),
        "CONSTANT": _identifier(name).upper(),
        "protocol": VERSION,
    }

    def rendered(template: str, **more: str) -> str:
        return _rendered(environment, template, words | more)

    texts = {
        "pyproject.toml": rendered("common/pyproject.toml.jinja"),
        "README.md": rendered("common/README.md.jinja", usage=rendered(f"{kind}/usage.md.jinja").strip()),
        ".gitignore": rendered("common/gitignore.jinja"),
        ".github/workflows/test.yml": rendered("common/test.yml.jinja"),
        f"tests/test_{_identifier(name)}.py": rendered(f"{kind}/test.py.jinja"),
    }
    if one.is_heavy:
        texts[f"{module}/__init__.py"] = rendered(f"{kind}/init.py.jinja")
        texts[f"{module}/settings.py"] = rendered(f"{kind}/settings.py.jinja")
        texts[f"{module}/{kind}.py"] = rendered(f"{kind}/module.py.jinja")
        texts[f"{module}/py.typed"] = ""
    else:
        texts[f"{module}.py"] = rendered(f"{kind}/module.py.jinja")
    return texts


def _rendered(environment: jinja2.Environment, template: str, words: dict[str, Any]) -> str:
    return environment.get_template(template).render(words).rstrip() + "\n"
