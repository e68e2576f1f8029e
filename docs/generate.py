"""What of the site is made and not written, as a hook of MkDocs.

- the reference of settings, attributes and presets, from what is installed;
- the reference of Python: what each public package exports, each name where it is defined;
- pages of files that lie elsewhere in the repository: SECURITY.md, the plugins' README.md and the like;
- links of a page to other files of the repository, which come along in the folder ``source``.
"""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File, Files, InclusionLevel

from icekit import plugins
from icekit.bench.benchmark import BenchSettings
from icekit.cli.program import cli
from icekit.settings import ROLES, Components, Settings

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page
    from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    ROOT / "CHANGELOG.md": "project/changelog.md",
    ROOT / "CONTRIBUTING.md": "project/contributing.md",
    ROOT / "SECURITY.md": "project/security.md",
} | {file: f"plugins/{file.parent.name}.md" for file in sorted((ROOT / "plugins").glob("*/README.md"))}
"""Files of the repository that are pages of the site."""
COMPONENTS = {
    "backbone": "the pre-trained text-to-image model",
    "retriever": "image to words",
    "segmentor": "image and word to mask",
    "learner": "image and regions to tokens",
    "exporter": "what writes files from a run",
    "executor": "where `icekit batch` and `icekit bench` do their work",
    "metric": "what `icekit bench` measures",
    "dataset": "what `icekit bench` measures on",
}
PACKAGES = {
    "icekit": "What most programs and plugins need.",
    "icekit.protocols": "What each kind of component must offer, and the values that pass between them.\n\n"
    "Everywhere in icekit: a picture is float32 `[3, H, W]` with values in [0, 1]; a mask is bool `[H, W]`; grids are "
    "(height, width); how noisy something is, is a share of the noise schedule, in [0, 1].",
    "icekit.learning": "What a learner is made of. ICE's own learner is built on it.",
    "icekit.attention": "What a segmentor is made of. The `xattn` and `diffseg` segmentors are built on it.",
    "icekit.backbones": "What a backbone is made of. The `sd21` and `tabletop` backbones are built on it.",
    "icekit.testing": "The conformance checks that a plugin's own tests run.",
}
"""The public packages."""
INSTEAD = {ROOT / "README.md": "index.md"} | {
    ROOT.joinpath(*package.split("."), "__init__.py"): f"reference/{package.rpartition('.')[2]}.md"
    for package in PACKAGES
}
"""Files that are no page of the site, and the page that takes their place in links."""
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)#\s:]+)(?P<anchor>#[^)\s]*)?\)")
"""A link of Markdown to a file."""
MOST_SHOWN = 40
"""Characters of a default value; more of it would make the table's other columns narrow."""


def on_startup(command: str, dirty: bool) -> None:
    """Let plugins add their commands, as the program does; the reference of commands reads the group."""
    plugins.installed().each("register_commands", cli=cli.of)
    cli.origin = None


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give every plugin of the repository its place in the navigation."""
    plugin_pages = [uri for uri in ELSEWHERE.values() if uri.startswith("plugins/")]
    config.nav.append({"Plugins of the repository": [{Path(uri).stem: uri} for uri in plugin_pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is made to what is written."""
    for uri, text in reference().items():
        files.append(File.generated(config, uri, content=text))
    for file, uri in ELSEWHERE.items():
        files.append(File.generated(config, uri, content=file.read_text(encoding="utf-8")))
    for file in linked(files):
        uri = f"source/{file.relative_to(ROOT)}"
        level = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, uri, content=file.read_bytes(), inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where their files are in the site; a link to a folder that is not there becomes plain text."""
    place = _place_of(page.file)

    def led(link: re.Match[str]) -> str:
        uri = _uri_of(place / link["target"])
        if uri is None:
            return link[0]
        return f"]({os.path.relpath(uri, Path(page.file.src_uri).parent)}{link['anchor'] or ''})"

    unlinked = re.sub(r"\[([^\]]+)\]\(([^)#\s:]+)\)", lambda link: _unlinked(link, place), markdown)
    return LINK.sub(led, unlinked)


def _unlinked(link: re.Match[str], place: Path) -> str:
    target = (place / link[2]).resolve()
    return link[1] if target.is_dir() and (target / "README.md") not in ELSEWHERE else link[0]


def linked(files: Files) -> Iterator[Path]:
    """The files outside of the site that its pages link to, each once."""
    found = {
        (_place_of(file) / link["target"]).resolve()
        for file in files.documentation_pages()
        for link in LINK.finditer(file.content_string)
    }
    for file in sorted(found):
        inside = file.is_file() and file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "docs")
        if inside and file not in ELSEWHERE | INSTEAD:
            yield file


def _place_of(file: File) -> Path:
    """The folder of the repository that a page's links start from."""
    homes = {uri: one.parent for one, uri in ELSEWHERE.items()}
    return homes.get(file.src_uri, (ROOT / "docs" / file.src_uri).parent)


def _uri_of(path: Path) -> str | None:
    """Where a file of the repository is in the site; None where it is not."""
    file = path.resolve()
    file = file / "README.md" if file.is_dir() else file
    if file in ELSEWHERE | INSTEAD:
        return (ELSEWHERE | INSTEAD)[file]
    if file.is_relative_to(ROOT / "docs"):
        return str(file.relative_to(ROOT / "docs"))
    return f"source/{file.relative_to(ROOT)}" if file.is_file() and file.is_relative_to(ROOT) else None


# --- The reference of settings ----------------------------------------------------------------------------------------


def reference() -> dict[str, str]:
    """The generated pages of the reference, by their place in the site."""
    found = plugins.installed()
    pages = {"run": _run_settings(), "bench": _bench_settings()}
    pages |= {f"{role}s": _components(found, role, what) for role, what in COMPONENTS.items()}
    pages |= {"attributes": _attributes(found), "presets": _presets(found)}
    pages["index"] = _index(found)
    made = {f"reference/settings/{name}.md": text for name, text in pages.items()}
    return made | {f"reference/{package.rpartition('.')[2]}.md": _package(package) for package in PACKAGES}


def _index(found: plugins.Plugins) -> str:
    lines = [
        "# Settings\n",
        "A setting has a key, as `learner.steps`. There are three ways to set it, and later ones win:\n",
        "1. a preset: `--preset NAME`;",
        "2. a settings file in TOML: `--config FILE.toml`, where `steps = 400` stands in the table `[learner]`;",
        "3. the command line: `--set learner.steps=400`.\n",
        "An unknown key and a wrong value are refused, with the nearest right one. `none` is no value, for a setting "
        "that may have none. `icekit plugins show NAME` prints the tables below in a terminal.\n",
        "These pages are made from what is installed where the site is built.\n",
        "| kind | what it is | names |",
        "| --- | --- | --- |",
    ]
    for role, what in COMPONENTS.items():
        names = ", ".join(f"[`{name}`]({role}s.md#{name})" for name in found.offered(role))
        lines.append(f"| [{role}]({role}s.md) | {what} | {names} |")
    for role in ("attribute", "preset"):
        names = ", ".join(f"[`{name}`]({role}s.md#{name})" for name in found.offered(role))
        what = "what tokens are learned for" if role == "attribute" else "a named set of settings"
        lines.append(f"| [{role}]({role}s.md) | {what} | {names} |")
    lines.append(
        "\nSettings of a run as a whole are on the page [of a run](run.md), a bench's on that [of a bench](bench.md)."
    )
    return "\n".join(lines) + "\n"


def _run_settings() -> str:
    return "\n".join([
        "# Settings of a run\n",
        "Top-level keys of a settings file; on the command line `--set max_concepts=4`.\n",
        *_table(Settings, "", leave_out=("components", *ROLES, "exporter")),
        "\n## Which plugin does what\n",
        "In a settings file they are in the table `[components]`; `--backbone NAME` is short for "
        "`--set components.backbone=NAME`.\n",
        *_table(Components, "components."),
        "\nThe settings of each component are on its own page: [backbones](backbones.md), [retrievers](retrievers.md), "
        "[segmentors](segmentors.md), [learners](learners.md).",
    ])  # fmt: skip


def _bench_settings() -> str:
    return "\n".join([
        "# Settings of a bench\n",
        "`icekit bench` takes [a run's settings](run.md) for all of its runs, those of components and "
        "[metrics](metrics.md) by their names (`learner.ice.steps=400`, `metric.sim_i.background=mean`), and "
        "these.\n",
        *_table(BenchSettings, "bench."),
    ])  # fmt: skip


def _components(found: plugins.Plugins, role: str, what: str) -> str:
    title = "Data sets" if role == "dataset" else f"{role.capitalize()}s"
    lines = [f"# {title}\n", f"{what[0].upper()}{what[1:]}.\n"]
    for name, one in found.offered(role).items():
        lines += [f"\n## {name}\n", f"{one.summary}\n", f"From {one.origin.distribution}.\n"]
        model = one.settings
        assert model is not None
        key = f"{role}.{name}." if role in ("metric", "exporter") else f"{role}."
        lines += list(_table(model, key)) if model.model_fields else ["It has no settings."]
    return "\n".join(lines) + "\n"


def _attributes(found: plugins.Plugins) -> str:
    lines = [
        "# Attributes\n",
        "`--attribute NAME` learns a token for it, for every concept. The *anchor* is the text that the token is held "
        "near while it is learned; the *words* are those that it is named with afterwards, as far as the backbone "
        "knows them.\n",
    ]
    for name, one in found.offered("attribute").items():
        value = one.value
        lines += [f"\n## {name}\n", f"Anchor: {value.anchor}. From {one.origin.distribution}."]
        if value.aliases:
            lines.append(f"Also called {', '.join(f'`{alias}`' for alias in value.aliases)}.")
        lines.append(f"\nWords: {', '.join(value.vocabulary)}.")
    return "\n".join(lines) + "\n"


def _presets(found: plugins.Plugins) -> str:
    lines = ["# Presets\n", "`--preset NAME` takes a named set of settings; what you set yourself is put over it.\n"]
    for name, one in found.offered("preset").items():
        lines += [f"\n## {name}\n", f"From {one.origin.distribution}.\n", "```toml", one.value.text.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _table(model: type[BaseModel], prefix: str, leave_out: tuple[str, ...] = ()) -> Iterator[str]:
    """A settings model as a table of Markdown: key, type, default, meaning."""
    schema = model.model_json_schema()
    yield '<div class="settings" markdown>\n'
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    own = vars(model).get("__annotations__", {})  # what it adds to the models it inherits from comes first
    for key, one in sorted(schema["properties"].items(), key=lambda field: field[0] not in own):
        if key not in leave_out:
            kind = _type(one, schema.get("$defs", {}))
            default = "" if model.model_fields[key].is_required() else f"`{_value(one.get('default'))}`"
            cells = [f"`{prefix}{key}`", kind, default, one.get("description", "")]
            yield f"| {' | '.join(_cell(cell) for cell in cells)} |"
    yield "\n</div>"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "&#124;").replace("<", "&lt;").split())


def _value(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN].rsplit(' ', 1)[0]} ..."


def _type(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A JSON schema in words: "integer, at least 1, or none"."""
    if "$ref" in schema:
        return _type(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "allOf" in schema:
        return _type(schema["allOf"][0], definitions)
    if "anyOf" in schema:
        kinds = [_type(one, definitions) for one in schema["anyOf"]]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{one}`" for one in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "any value"))
    if kind == "array":
        items = schema.get("items") or next(iter(schema.get("prefixItems", [])), {})
        kind, comma, limits = _type(items, definitions).partition(",")
        return f"list of {kind}{'s' * (kind in ('text', 'number', 'integer', 'table'))}{comma}{limits}"
    names = {"string": "text", "boolean": "true or false", "null": "none", "object": "table"}
    return names.get(kind, kind) + _limits(schema)


def _limits(schema: Mapping[str, Any]) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is not None and most is not None and most < 2**53:
        return f", {least:g} to {most:g}" if most < 10**6 else f", {least:g} to {most:,}"
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    return "".join(f", {words} {schema[key]:g}" for key, words in bounds.items() if schema.get(key, 2**53) < 2**53)


# --- The reference of Python ------------------------------------------------------------------------------------------


def _package(package: str) -> str:
    names = dict(exports(package))
    if not names:
        modules = sorted(ROOT.joinpath(*package.split(".")).glob("[a-z]*.py"))
        members = "".join(f"::: {package}.{one.stem}\n    options:\n      heading_level: 2\n\n" for one in modules)
        return f"# {package}\n\n{PACKAGES[package]}\n\n{members}"
    others = {name: home for name, home in names.items() if package == "icekit" and ".protocols." in home}
    lines = [f"# {package}\n", f"{PACKAGES[package]}\n"]
    for name in sorted(names.keys() - others.keys(), key=lambda name: (names[name].rpartition(".")[0], name)):
        lines += [f"::: {package}.{name}", "    options:", "      heading_level: 2\n"]
    if others:
        links = ", ".join(f"[`{name}`][icekit.protocols.{name}]" for name in sorted(others))
        lines.append(f"## Of icekit.protocols\n\nThese are exported by `icekit`, too: {links}.")
    return "\n".join(lines) + "\n"


def exports(package: str) -> Iterator[tuple[str, str]]:
    """The names that a package exports, each with the place where it is defined. Nothing is imported for it."""
    folder = ROOT.joinpath(*package.split("."))
    stub = folder / "__init__.pyi"
    tree = ast.parse((stub if stub.exists() else folder / "__init__.py").read_text(encoding="utf-8"))
    public = {
        one.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
        for one in getattr(node.value, "elts", [])
    }
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (stub.exists() or node.level or public):
            module = f"{package}.{node.module}" if node.level else str(node.module)
            for one in node.names:
                if stub.exists() or one.name in public:
                    yield one.name, f"{module}.{one.name}"
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public:
            yield node.name, f"{package}.{node.name}"
