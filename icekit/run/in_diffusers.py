"""A run's tokens in diffusers, without icekit: the lines of Python that load them and draw."""

from __future__ import annotations

import json

from icekit.run.directory import WEIGHTS_FOLDERS, RunDirectory
from icekit.run.records import BackboneRecord


def python_code(run: RunDirectory, place: str, model: str, backbone: BackboneRecord, prompt: str) -> str:
    """Python code that draws a picture with a run's tokens, and with what was made of the noise predictor.

    What a run directory says becomes part of the code as a string or as an identifier alone.

    Args:
        run: which says what was trained.
        place: the directory as the code is to name it.
        model: what ``from_pretrained`` of the pipeline takes.
        backbone: as in the manifest: the pipeline, and how tokens come into its text encoders.
        prompt: what is drawn.

    Returns:
        The code; empty where the run does not say which pipeline loads the model, or how.
    """
    pipeline, places = backbone.pipeline_class or "", [backbone.pipeline_encoders.get(name) for name in backbone.rows]
    whole = backbone.pipeline_loads_tokens and len(places) == 1
    names = [pipeline, *backbone.pipeline_without, *(part for parts in places for part in parts or ())]
    if not all(name.isidentifier() for name in names) or (not whole and any(len(one or ()) != 2 for one in places)):
        return ""
    imports, more, tuned = [pipeline], "", ""
    for folder in WEIGHTS_FOLDERS:
        kind = str(run.weights_config(folder).get("_class_name", ""))
        if kind.isidentifier():
            imports.append(kind)
            tuned += f"pipe.{folder} = {kind}.from_pretrained({_quoted(f'{place}/{folder}')})\n"
    if run.files.find("lora.safetensors"):
        tuned += f'pipe.load_lora_weights({_quoted(place)}, weight_name="lora.safetensors")\n'
    if whole:
        loading = '    pipe.load_textual_inversion(str(file), token=f"<{file.stem}>")\n'
    else:
        more += "from safetensors.torch import load_file\n"
        more += "" if backbone.pipeline_loads_tokens else "from tokenizers import AddedToken\n"
        loading = _by_encoder(backbone)
    without = "".join(f", {part}=None" for part in backbone.pipeline_without)
    return (
        f"from pathlib import Path\nfrom diffusers import {', '.join(imports)}\n{more}\n"
        f"pipe = {pipeline}.from_pretrained({_quoted(model)}{without})\n"
        f'for file in sorted(Path({_quoted(f"{place}/embeddings")}).glob("*.safetensors")):\n'
        f"{loading}{tuned}image = pipe(prompt={_quoted(prompt)}).images[0]\n"
    )


def _by_encoder(backbone: BackboneRecord) -> str:
    """The lines that hand a token's rows to each text encoder."""
    several = len(backbone.rows) > 1
    code = '    rows, token = load_file(file), f"<{file.stem}>"\n'
    pairs = []
    for name in backbone.rows:
        tokenizer, encoder = backbone.pipeline_encoders[name]
        row = f"rows[{_quoted(name)}]" if several else "rows[token]"
        pairs.append(f"(pipe.{tokenizer}, pipe.{encoder})")
        if backbone.pipeline_loads_tokens:
            to = f"tokenizer=pipe.{tokenizer}, text_encoder=pipe.{encoder}"
            code += f"    pipe.load_textual_inversion({row}, token=token, {to})\n"
    if not backbone.pipeline_loads_tokens:
        values = ", ".join(f"rows[{_quoted(name)}]" for name in backbone.rows) if several else "rows[token]"
        spelled = "normalized=False" + ", lstrip=True" * backbone.pipeline_takes_space
        code += (
            f"    for (tokenizer, encoder), row in zip([{', '.join(pairs)}], [{values}]):\n"
            f"        tokenizer.add_tokens(AddedToken(token, {spelled}))\n"
            "        size = max(len(tokenizer), encoder.get_input_embeddings().num_embeddings)\n"
            "        table = encoder.resize_token_embeddings(size, mean_resizing=False)\n"
            "        table.weight.data[tokenizer.convert_tokens_to_ids(token)] = row\n"
        )
    if several:
        code += (
            f"for tokenizer, encoder in ({', '.join(pairs)}):\n"
            '    model = getattr(encoder, "text_model", encoder)\n'
            '    if hasattr(model, "eos_token_id"):\n'
            "        model.eos_token_id = tokenizer.eos_token_id  # pool a prompt at its end\n"
        )
    return code


def _quoted(text: str) -> str:
    """A Python string, as which JSON's are read."""
    return json.dumps(text, ensure_ascii=False)
