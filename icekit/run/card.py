"""A run's model card: ``README.md``, with which a run directory can be uploaded to the hub, or handed on, as it is.

It is made from what the manifest says and from what lies in the directory, of nothing that a resumed run has
otherwise: no times, and no paths of the machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from urllib.parse import quote

from icekit.protocols import is_instance, object_tokens
from icekit.protocols.errors import printable
from icekit.run.directory import VECTORS, RunDirectory, sample_name
from icekit.run.in_diffusers import python_code
from icekit.run.records import ConceptRecord, Manifest
from icekit.settings import Settings

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""What the id of a hub model looks like, ``owner/name``."""
MEANINGS = {"category": "the kind of thing it is", "instance": "what makes it this one"}
NO_MODEL = "MODEL"
"""In the code of a card, where the model is none of the hub's."""


def model_card(run: RunDirectory, manifest: Manifest, settings: Settings) -> str:
    """The card of a run, Markdown after front matter in YAML.

    Args:
        run: where its files are; samples that are not there are left out.
        manifest: which need not be on disk yet.
        settings: which name the model.

    Raises:
        InputError: a file of the run is damaged.
    """
    base = _hub_model(settings)
    tuned = [name.partition("/")[0] for name in run.tuning_files()]
    kinds = ["textual_inversion", *(["lora"] if "lora.safetensors" in tuned else []), "icekit"]
    files = [one.file for one in manifest.imported]
    title = _last(manifest.image.source) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    prompt = f"a photo of a {object_tokens(manifest.concepts[0].tokens)}" if manifest.concepts else ""
    backbone = manifest.backbone
    code = python_code(run, ".", base or NO_MODEL, backbone, prompt) if backbone else ""
    lines = [
        "---",
        *([f"base_model: {json.dumps(base)}"] if base else []),
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "tags:",
        *(f"- {kind}" for kind in kinds),
        "# license: yours to choose; the picture and the base model have terms of their own",
        "---",
        "",
        f"# Concepts of {_plain(title)}",
        "",
        f"![{'drawn with each' if files else 'the picture that the concepts are of'}](image.png)",
        "",
        f"{_told(manifest)} The tokens belong to {_model(settings, base)} and to models with the same text encoders.",
        "",
        "| concept | mask | token | it stands for | words near it | drawn with it |",
        "| --- | --- | --- | --- | --- | --- |",
        *(row for concept in manifest.concepts for row in _rows(run, concept)),
        "",
        *_use(manifest, prompt, code, named=bool(base)),
        "## What is here",
        "",
        "- `embeddings/`: a file a token; `embeddings.safetensors`: all of them together",
        *(["- `lora.safetensors`: a LoRA adapter, with which the tokens were learned"] * ("lora.safetensors" in tuned)),
        *(f"- `{one}/`: the noise predictor, all weights of which were trained" for one in _folders(tuned)),
        *([f"- `{VECTORS}`: where CLIP places each concept, for `icekit find`"] * bool(run.files.find(VECTORS))),
        "- `masks/`: where each concept is in `image.png`, white",
        "- `manifest.json`, `settings.toml`: what it was made of, and with which settings",
        *(["- `report.html`: the run, explained"] * ("report" in settings.exporters)),
        "",
    ]
    return "\n".join(lines)


def _told(manifest: Manifest) -> str:
    """What the run is."""
    version = _plain(manifest.icekit_version)
    if manifest.imported:
        return (
            f"{_counted(len(manifest.concepts), 'concept')} of embeddings that other programs have learned, read by "
            f"icekit {version}. The picture is what the model draws with each."
        )
    return (
        f"{_counted(len(manifest.concepts), 'concept')} of one picture, each with a mask and with tokens for a "
        f"text-to-image model, found and learned by icekit {version}."
    )


def _folders(tuned: Sequence[str]) -> list[str]:
    return sorted({one for one in tuned if one != "lora.safetensors"})


def _rows(run: RunDirectory, concept: ConceptRecord) -> list[str]:
    """The table's rows of one concept, one a token."""
    rows = []
    of_object = "instance" if "instance" in concept.tokens else "category"
    for place, (part, token) in enumerate(concept.tokens.items()):
        sample = sample_name(concept.index, "object" if part == of_object else part, 0)
        cells = [
            f"{concept.index}: {_plain(concept.label)}" if place == 0 else "",
            f'<img src="{quote(concept.mask)}" width="120" alt="mask">' if place == 0 else "",
            _code(token),
            _plain(MEANINGS.get("instance" if is_instance(part) else part, f"its {part}")),
            _plain(", ".join(concept.words.get(part, []))),
            f'<img src="{quote(sample)}" width="120" alt="sample">' if run.files.find(sample) else "",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _use(manifest: Manifest, prompt: str, code: str, *, named: bool) -> list[str]:
    """How pictures are made with it."""
    lines = ["## Use", "", "With icekit, in this folder:", "", "```bash"]
    lines += ['icekit compose "a photo of {a}" a=.:0', "```", ""]
    if code and manifest.concepts:
        lines += ["With diffusers, in this folder:", "", "```python", *code.splitlines(), "```", ""]
        lines += [] if named else [f"`{NO_MODEL}` is the model's folder or its id on the hub.", ""]
    return lines


def _hub_model(settings: Settings) -> str | None:
    model = settings.values_of("backbone").get("model")
    return model if isinstance(model, str) and HUB_ID.fullmatch(model) else None


def _model(settings: Settings, base: str | None) -> str:
    """The model in words, without the place of a folder on somebody's machine."""
    if base:
        return f"[{base}](https://huggingface.co/{quote(base)})"
    model = settings.values_of("backbone").get("model")
    of = f", model {_code(_last(str(model)))}" if model else ""
    return f"icekit's backbone {_code(settings.name_of('backbone'))}{of}"


def _last(path: str) -> str:
    """The last part of a path of any system."""
    return PurePosixPath(path.replace("\\", "/")).name or path


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _code(text: str) -> str:
    """Text of others as code in Markdown, in a table, too."""
    shown = printable(" ".join(text.split()), 200).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`"


def _plain(text: str) -> str:
    """Text of others in Markdown, where it means nothing: one line, signs escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!])", r"\\\1", printable(" ".join(text.split()), 200))
