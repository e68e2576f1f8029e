"""Settings, manifests and pictures of every shape that a generator thinks of: read, or refused in one line."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from icekit import Extraction, InputError, Settings, load_settings
from icekit.run.images import load_image
from icekit.settings import flatten, parse_assignment

from .fuzz import _whole_run, picture

often = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seldom = settings(often, max_examples=60)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "/etc/passwd", "../x", "\x00", "<script>", "1e400", "nan", "true", "5" * 5000])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
toml_values = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=20) | st.dates() | st.times(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
keys = st.sampled_from([*Settings.model_fields, *flatten(Settings().model_dump(mode="json")), "learner.steps", "x"])


def refused(error: InputError) -> None:
    message = str(error)
    assert message.strip() and "\n" not in message and len(message) < 1500, message[:2000]


# --- Settings --------------------------------------------------------------------------------------------------------


@often
@given(key=keys | st.text(max_size=12), text=st.text(max_size=30) | values.map(repr))
def test_any_assignment(key: str, text: str) -> None:
    try:
        load_settings(None, [f"{key}={text}"], {})
    except InputError as error:
        refused(error)


@often
@given(st.dictionaries(keys.filter(lambda key: "." not in key) | st.text(max_size=8), toml_values, max_size=4))
def test_any_settings_file(tmp_path: Path, table: dict[str, Any]) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(tomli_w.dumps(table), encoding="utf-8", errors="replace")
    try:
        found = load_settings(file)
    except InputError as error:
        refused(error)
    else:  # what is taken is kept as it is, and can be read again
        file.write_text(found.to_toml(), encoding="utf-8")
        # As text: no NaN is equal to another.
        assert repr(load_settings(file).model_dump(mode="json")) == repr(found.model_dump(mode="json"))


@often
@given(st.text(max_size=40))
def test_any_text_for_an_assignment(text: str) -> None:
    try:
        parse_assignment(text)
    except InputError as error:
        refused(error)


# --- Run directories -------------------------------------------------------------------------------------------------


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested JSON, as the keys that lead there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way] * bool(way) + [place for key, one in inner for place in places(one, (*way, key))]


@often
@given(data=st.data())
def test_a_manifest_with_any_value_in_any_place(data: st.DataObject) -> None:
    folder = _whole_run()
    file = folder / "manifest.json"
    whole = file.read_text()
    manifest = json.loads(whole)
    changed = copy.deepcopy(manifest)
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places(changed)))
        place = changed
        for key in way:
            place = place[key]
        if data.draw(st.booleans()) and isinstance(place, dict):
            del place[last]
        else:
            place[last] = data.draw(values)
        if not places(changed):
            break
    file.write_text(json.dumps(changed), encoding="utf-8", errors="surrogatepass")
    try:
        for concept in Extraction.open(folder).concepts:
            assert concept.mask_file.resolve().is_relative_to(folder.resolve())
            concept.mask()
    except InputError as error:
        refused(error)
    finally:
        file.write_text(whole)


@seldom
@given(data=st.data())
def test_an_embeddings_file_with_any_bytes_changed(data: st.DataObject) -> None:
    folder = _whole_run()
    file = folder / "embeddings.safetensors"
    whole = file.read_bytes()
    changed = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        changed[place] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(changed[: data.draw(st.integers(0, len(changed)))]))
    try:
        Extraction.open(folder)
    except InputError as error:
        refused(error)
    finally:
        file.write_bytes(whole)


# --- Pictures --------------------------------------------------------------------------------------------------------

KINDS = {"PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "TIFF": ("RGB", "L", "F", "I;16", "CMYK", "LAB")}
KINDS |= {"JPEG": ("RGB", "L", "CMYK"), "BMP": ("RGB", "L", "1"), "PPM": ("RGB", "L"), "WEBP": ("RGB", "RGBA")}


@seldom
@given(
    kind=st.sampled_from([(kind, mode) for kind, modes in KINDS.items() for mode in modes]),
    pixels=arrays(np.uint8, st.tuples(st.integers(32, 48), st.integers(32, 48), st.just(3))),
)
def test_a_picture_of_any_format_mode_and_proportions(kind: tuple[str, str], pixels: np.ndarray) -> None:
    name, mode = kind
    image = Image.fromarray(pixels)
    image = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, name)
    picture(buffer.getvalue())
    found = load_image(Image.open(buffer))
    assert (found.picture.mode, found.picture.size) == ("RGB", image.size)


@seldom
@given(data=st.data(), kind=st.sampled_from([*KINDS, "GIF"]))
def test_a_picture_with_any_bytes_changed(data: st.DataObject, kind: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(40 * 36 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 36, 3)).save(buffer, kind)
    changed = bytearray(buffer.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(changed) - 1), min_size=1, max_size=6)):
        changed[place] = data.draw(st.integers(0, 255))
    picture(bytes(changed))


@pytest.mark.parametrize("size", [(32, 32), (32, 4000), (4000, 32)])
def test_a_picture_of_extreme_proportions(size: tuple[int, int]) -> None:
    assert load_image(Image.new("RGB", size)).picture.size == size
