"""Composition: placeholders, bindings, and the refusal of what cannot be mixed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_components as plain
import pytest
import torch
from icekit_process import write_report
from PIL import Image
from safetensors.torch import load_file, save_file

from icekit import Extraction, InputError, extract
from icekit.plugins import Plugins
from icekit.run.compose import bind, compose, plan_images, remake, split_reference
from icekit.run.prompts import plain_word, weighted_row
from icekit.run.sheets import Layout, Sheet, plain_layout
from icekit.settings import load_settings

TOKENS = {
    "a": {"category": "<a-cup-0>", "instance": "<a-cup-0-instance>", "colour": "<a-cup-0-colour>"},
    "bowl": {"category": "<b>", "instance": "<b-i>", "material": "<b-m>"},
    "many": {"category": "<m>", "instance": "<m-i>", "colour": "<m-c>", "material": "<m-m>", "texture": "<m-t>"},
    "style": {"colour": "<s-c>"},
}


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return plain.beside_builtins()


@pytest.fixture(scope="module")
def runs(plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    names = {role: "plain" for role in ("backbone", "retriever", "segmentor", "learner")}
    options: dict[str, Any] = {"components": names, "samples": 0, "max_concepts": 2}
    more_of: dict[str, dict[str, Any]] = {
        "one": {},
        "two": {"seed": 1},
        "other": {"backbone": {"model": "large"}},
        "moved": {"backbone": {"model": "somewhere/else/plain"}},
    }
    for name, more in more_of.items():
        settings = load_settings(options=options | more)
        extract(Image.new("RGB", (50, 50), "red"), folder / name, settings, installed=plugins)
    return {name: folder / name for name in more_of}


@pytest.mark.parametrize(
    ("prompt", "expanded"),
    [
        ("a photo of {a}", "a photo of <a-cup-0-instance> <a-cup-0>"),
        ("a cup, {bowl.material} {a.colour}", "a cup, <b-m> <a-cup-0-colour>"),
        ("{a.category}{a.instance}", "<a-cup-0><a-cup-0-instance>"),
        ("{{braces}} stay, [red|blue] and }} too", "{braces} stay, [red|blue] and } too"),
        ("{a - instance} in black", "<a-cup-0> in black"),
        ("{ a - category }", "<a-cup-0-instance>"),
        ("{many - colour} in black", "<m> <m-m> <m-t> in black"),
        ("{many - colour - material}", "<m> <m-t>"),
        ("{many - category - colour}", "<m-m> <m-t>"),
        ("{a.colour:1}", "<a-cup-0-colour>"),
        ("{a.colour:1.30} {a:0.8}", "<a-cup-0-colour:1.3> <a-cup-0-instance:0.8> <a-cup-0:0.8>"),
        ("{many - colour:2}", "<m:2> <m-m:2> <m-t:2>"),
    ],
)
def test_expand(prompt: str, expanded: str) -> None:
    assert plan_images(prompt, TOKENS, 1).expanded == expanded


@pytest.mark.parametrize(
    ("prompt", "hint"),
    [
        ("{c}", "{c} at character 1, but no concept 'c': choose from a, bowl, many, style"),
        ("a photo of {bow}", "at character 12, but no concept 'bow': did you mean 'bowl'"),
        ("{a.color}", "did you mean 'colour'"),
        ("{a.material}", "choose from category, colour, instance"),
        ("{a - material}", "a has no token 'material': choose from category, colour, instance"),
        ("{a - category - instance}", "that leaves nothing of a"),
        ("{style}", "style has neither an instance nor a category: name one of its tokens, as in {style.colour}"),
        ("{a", "prompt '{a' has a '{' that is not closed"),
        ("a}", "has a '}' that closes nothing: '}}' is a brace in plain text (at character 2)"),
        ("{}", "no concept '' can be: write {a}"),
        ("{a!r}", "no concept 'a!r' can be"),
        ("{a-colour}", "a minus has spaces around it: {a - colour} (at character 1)"),
        ("{a.colour - colour}", "{a - colour} is the concept without it"),
        ("{a.colour:strong}", "'strong' is no weight: write a number from 0 to 3"),
        ("{a.colour:-1}", "'-1' is no weight"),
        ("{a.colour:nan}", "'nan' is no weight"),
        ("{a|bowl}", "has alternatives, {a|bowl}: only a sweep (sweep=True) takes them"),
        (" ", "is empty"),
    ],
)
def test_wrong_prompt(prompt: str, hint: str) -> None:
    with pytest.raises(InputError) as error:
        plan_images(prompt, TOKENS, 1)
    assert hint in str(error.value)


def test_alternatives_are_the_rows_and_columns_of_a_sweep() -> None:
    plan = plan_images("a {a.colour|bowl.material:0.5} thing, [red|{a - colour}|]", TOKENS, 2, sweep=True)
    assert (plan.layout.rows, plan.layout.columns) == (
        ("a.colour", "bowl.material:0.5"),
        ("red", "a - colour", "(nothing)"),
    )
    assert [cell.text for cell in plan.cells] == [
        "a <a-cup-0-colour> thing, red", "a <a-cup-0-colour> thing, <a-cup-0>", "a <a-cup-0-colour> thing, ",
        "a <b-m:0.5> thing, red", "a <b-m:0.5> thing, <a-cup-0>", "a <b-m:0.5> thing, ",
    ]  # fmt: skip
    assert plan.expanded == "a [<a-cup-0-colour>|<b-m:0.5>] thing, [red|<a-cup-0>|]"
    row = plan_images("[one] of {a|bowl|a - colour}", TOKENS, 1, sweep=True)
    assert (row.layout.rows, row.layout.columns) == (("",), ("a", "bowl", "a - colour"))
    assert row.cells[0].text == "[one] of <a-cup-0-instance> <a-cup-0>"


@pytest.mark.parametrize(
    ("prompt", "hint"),
    [
        ("{a} in black", "has nothing to choose from: a sweep has one (a row of pictures) or two"),
        ("{a|bowl} [red|blue] [big|small]", "has 3 alternations: a sweep has one"),
        ("[red|{a|bowl}]", "has alternatives within alternatives"),
        ("{a|}", "no concept '' can be"),
        ("{a|c}", "{c} at character 1, but no concept 'c'"),
        ("[" + "|".join("x" * 200) + "] [" + "|".join("x" * 200) + "]", "asks for 40000 images: 10000 at most"),
    ],
)
def test_wrong_sweep(prompt: str, hint: str) -> None:
    with pytest.raises(InputError) as error:
        plan_images(prompt, TOKENS, 1, sweep=True)
    assert hint in str(error.value)


def test_a_weight_moves_a_row_on_the_line_from_its_plain_word() -> None:
    row, plain = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    assert weighted_row(row, plain, 1) is row
    assert torch.equal(weighted_row(row, plain, 0), plain)
    assert torch.allclose(weighted_row(row, plain, 1.5) - row, 0.5 * (row - plain), atol=1e-6)
    assert [plain_word(part, "red-bowl") for part in ("category", "instance2", "colour", "surface-finish")] == [
        "red bowl", "red bowl", "colour", "surface finish",
    ]  # fmt: skip


def test_reference(tmp_path: Path) -> None:
    assert split_reference("runs/photo") == ("runs/photo", None)
    assert split_reference("runs/photo:cup") == ("runs/photo", "cup")
    (tmp_path / "odd:name").mkdir()
    assert split_reference(f"{tmp_path}/odd:name") == (f"{tmp_path}/odd:name", None)
    assert split_reference(f"{tmp_path}/odd:name:1") == (f"{tmp_path}/odd:name", "1")


def test_two_runs_with_the_same_tokens_do_not_clash(runs: dict[str, Path]) -> None:
    one, two = bind("a", runs["one"]), bind("b", f"{runs['two']}:0")
    assert one.tokens["colour"] == "<a-cup-0-colour>"
    assert not one.rows.keys() & two.rows.keys()
    assert bind("a", Extraction.open(runs["one"])).tokens == one.tokens
    with pytest.raises(InputError, match="cannot stand for a concept"):
        bind("1 2", runs["one"])


def test_images_and_what_they_were_made_of(plugins: Plugins, runs: dict[str, Path], tmp_path: Path) -> None:
    bindings = {"a": runs["one"], "b": f"{runs['two']}:red-bowl"}
    made = compose("a {a} of {b.material}", bindings, n=3, seed=5, out=tmp_path / "out", installed=plugins)
    assert made.expanded == "a <a-cup-0-instance> <a-cup-0> of <b-red-bowl-1-material>"
    assert [path.name for path in made.images] == ["0.png", "1.png", "2.png"]
    assert len(set(made.seeds)) == 3
    record = json.loads((tmp_path / "out" / "prompt.json").read_text())
    assert record["prompt"] == "a {a} of {b.material}"
    digest = record["concepts"]["b"].pop("tokens_sha256")
    assert record["concepts"]["b"] == {"run": str(runs["two"]), "index": 1, "label": "red-bowl"}
    assert len(digest) == 64 and digest != record["concepts"]["a"]["tokens_sha256"]
    assert (made.sheet, record["sheet"], record["sweep"]) == (tmp_path / "out" / "sheet.png", "sheet.png", None)
    first = [path.read_bytes() for path in made.images]
    with pytest.raises(InputError, match="already holds a composition"):
        compose("{a}", bindings, out=tmp_path / "out", installed=plugins)
    compose("a {a} of {b.material}", bindings, n=2, seed=5, out=tmp_path / "out", overwrite=True, installed=plugins)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0.png",
        "1.png",
        "prompt.json",
        "sheet.png",
    ]
    assert [(tmp_path / "out" / f"{i}.png").read_bytes() for i in range(2)] == first[:2]


def test_a_sweep_and_its_remake(plugins: Plugins, runs: dict[str, Path], tmp_path: Path) -> None:
    """Each picture is the same as alone, and the sidecar is enough to make them all again."""
    bindings = {"a": runs["one"], "b": f"{runs['two']}:1"}
    made = compose(
        "{a|b} with {a.colour:1.3|b.colour|a.colour:1}", bindings, sweep=True, seed=3, out=tmp_path / "grid",
        installed=plugins,
    )  # fmt: skip
    assert (made.rows, made.columns) == (("a", "b"), ("a.colour:1.3", "b.colour", "a.colour:1"))
    assert len(made.images) == 6 and set(made.seeds) == {made.seeds[0]}
    for number, prompt in ((0, "{a} with {a.colour:1.3}"), (2, "{a} with {a.colour}"), (4, "{b} with {b.colour}")):
        alone = compose(prompt, bindings, n=1, seed=3, out=tmp_path / f"alone-{number}", installed=plugins)
        assert alone.images[0].read_bytes() == made.images[number].read_bytes()
        assert alone.sheet is None and not (alone.out / "sheet.png").exists()
    assert made.images[0].read_bytes() != made.images[2].read_bytes()

    again = remake(made.out, out=tmp_path / "again", installed=plugins)
    for path in made.out.iterdir():
        assert (again.out / path.name).read_bytes() == path.read_bytes()

    moved = Path(shutil.copytree(runs["one"], tmp_path / "moved"))
    record = json.loads((made.out / "prompt.json").read_text())
    record["concepts"]["a"]["run"] = str(tmp_path / "gone")
    (again.out / "prompt.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="gone, which is not there: say where it is, as in a=RUN_DIR"):
        remake(again.out, out=tmp_path / "third", installed=plugins)
    with pytest.raises(InputError, match="other tokens than a has in"):
        remake(again.out, {"a": runs["two"]}, out=tmp_path / "third", installed=plugins)
    with pytest.raises(InputError, match="has no concept 'c': its prompt has a, b"):
        remake(again.out, {"c": moved}, out=tmp_path / "third", installed=plugins)
    third = remake(again.out, {"a": moved}, out=tmp_path / "third", installed=plugins)
    assert [one.read_bytes() for one in third.images] == [one.read_bytes() for one in made.images]
    (again.out / "prompt.json").write_text(json.dumps(record | {"n": "many"}))
    with pytest.raises(InputError, match="does not say how to make its images again"):
        remake(again.out, {"a": moved}, out=tmp_path / "fourth", installed=plugins)
    with pytest.raises(InputError, match=r"is no composition of icekit's: it has no prompt\.json"):
        remake(moved, installed=plugins)


def test_a_sheet_has_every_picture_in_its_place_and_labels(tmp_path: Path) -> None:
    layout = Layout(("a", "a label that is far too long for one line"), ("red", "green", ""), across=2)
    sheet = Sheet(layout, (32, 64))
    bare = sheet.image.copy()
    colours = [(20 * number, 255 - 20 * number, 7) for number in range(layout.count)]
    for number in reversed(range(layout.count)):
        sheet.put(number, Image.new("RGB", (64, 32), colours[number]))
    pixels = list(sheet.image.get_flattened_data())
    area = pixels.count(colours[0])
    assert area >= 64 * 32 and all(pixels.count(colour) == area for colour in colours)
    places = [divmod(pixels.index(colour), sheet.image.width) for colour in colours]
    assert places == sorted(places) and len({row for row, _ in places}) == 2
    ink = [pixel for pixel in bare.get_flattened_data() if sum(pixel) < 100]
    assert len(ink) > 200
    plain = Sheet(plain_layout(5), (64, 64)).image
    assert set(plain.get_flattened_data()) == {(255, 255, 255)} and plain.width > plain.height
    assert max(Sheet(plain_layout(10_000), (512, 512)).image.size) <= 8192


def test_default_folder_is_new_each_time(
    plugins: Plugins, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [compose("A photo of {a} !", {"a": runs["one"]}, n=1, installed=plugins).out for _ in range(3)]
    assert [str(folder) for folder in folders] == [f"compositions/a-photo-of-a{suffix}" for suffix in ("", "-2", "-3")]


def test_one_model_in_two_folders_is_one_model(plugins: Plugins, runs: dict[str, Path], tmp_path: Path) -> None:
    """What tokens depend on is compared, and not how the model was named."""
    bindings = {"a": runs["one"], "b": runs["moved"]}
    assert compose("{a} {b}", bindings, n=1, out=tmp_path / "out", installed=plugins).images[0].is_file()


def test_a_model_that_is_another_one_by_now_is_refused(
    plugins: Plugins, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = plain.PlainBackbone.__init__

    def replaced(self: plain.PlainBackbone, *arguments: Any) -> None:
        build(self, *arguments)
        self.identity = "the words of another"

    monkeypatch.setattr(plain.PlainBackbone, "__init__", replaced)
    with pytest.raises(InputError, match="the tokens of a were learned with another model than the one that plain"):
        compose("{a}", {"a": runs["one"]}, out=tmp_path / "out", installed=plugins)
    assert not (tmp_path / "out").exists()


def test_images_are_made_in_one_call_and_as_the_backbone_makes_them(
    plugins: Plugins, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    generate = plain.PlainBackbone.generate

    def recorded(self: Any, prompts: Any, **options: Any) -> Any:
        asked.append(options | {"prompts": prompts})
        return generate(self, prompts, **options)

    monkeypatch.setattr(plain.PlainBackbone, "generate", recorded)
    counts: list[tuple[int, int]] = []
    compose(
        "{a}", {"a": runs["one"]}, n=3, out=tmp_path / "out", installed=plugins,
        on_image=lambda done, total: counts.append((done, total)),
    )  # fmt: skip
    [call] = asked
    assert (len(call["prompts"]), call["steps"], call["guidance_scale"]) == (3, None, None)
    assert counts == [(1, 3), (2, 3), (3, 3)]


def version_1(run: Path, folder: Path) -> Path:
    """A run directory as icekit wrote it before its schema version was 2."""
    shutil.copytree(run, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["backbone"], manifest["image"]["fitted"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 1, "icekit_version": "0.1.0"}))
    settings = (folder / "settings.toml").read_text()
    settings = settings.replace('naming = "described"', "describe = true\nrename = true\ndivide = false")
    settings = settings.replace("[backbone]", "[backbone]\nwords_only = false")
    settings = settings.replace('sample_steps = "none"', "sample_steps = 25")
    settings = settings.replace('guidance_scale = "none"', "guidance_scale = 4.0")
    (folder / "settings.toml").write_text(settings)
    return folder


def test_a_run_of_the_version_before_is_read(plugins: Plugins, runs: dict[str, Path], tmp_path: Path) -> None:
    old = version_1(runs["one"], tmp_path / "old")
    assert "rename" in (old / "settings.toml").read_text()
    run = Extraction.open(old)
    assert run.identity is None
    for token, rows in Extraction.open(runs["one"]).tokens.items():
        assert torch.equal(run.tokens[token]["clip_l"], rows["clip_l"])

    bindings = {"a": old, "b": runs["two"]}
    mixed = compose("{a} {b.colour}", bindings, n=1, out=tmp_path / "mixed", installed=plugins)
    same = compose("{a} {b.colour}", bindings | {"a": runs["one"]}, n=1, out=tmp_path / "same", installed=plugins)
    assert mixed.images[0].read_bytes() == same.images[0].read_bytes()
    with pytest.raises(InputError, match="different backbones"):
        compose("{a} {b}", {"a": old, "b": runs["other"]}, installed=plugins)

    (old / "report.html").unlink()
    assert "&lt;cup-0-colour&gt;" in write_report(old).read_text()
    names = {role: "plain" for role in ("backbone", "retriever", "segmentor", "learner")}
    picture, settings = Image.new("RGB", (50, 50), "red"), load_settings(options={"components": names})
    with pytest.raises(InputError, match=r"another version of icekit \(schema version 1\) .*overwrite=True"):
        extract(picture, old, settings, resume=True, installed=plugins)


def test_what_cannot_be_mixed(plugins: Plugins, runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"different backbones \(plain with model plain, plain with model large\)"):
        compose("{a} {b}", {"a": runs["one"], "b": runs["other"]}, installed=plugins)
    with pytest.raises(InputError, match="no concept given"):
        compose("a cup", {}, installed=plugins)
    with pytest.raises(InputError, match="cannot be 0"):
        compose("{a}", {"a": runs["one"]}, n=0, installed=plugins)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="no composition of icekit's"):
        compose("{a}", {"a": runs["one"]}, out=tmp_path, overwrite=True, installed=plugins)


# --- Models of all families ------------------------------------------------------------------------------------------


def of_a_word(out: Path, model: Path | None = None, *, word: str = "cup", backbone: str = "sd21") -> Path:
    """A run of this model with one concept, whose tokens are the rows of its word: nothing is learned."""
    mask = out.with_suffix(".mask.png")
    picture = Image.new("L", (64, 64))
    picture.paste(255, (8, 8, 40, 40))
    picture.save(mask)
    options = {
        "components": {"backbone": backbone, "retriever": "words", "segmentor": "masks", "learner": "words"},
        "retriever": {"words": [word]},
        "segmentor": {"files": [str(mask)]},
        "backbone": {"model": str(model)} if model else {},
        "exporters": [],
        "samples": 0,
        "sample_steps": 1,
    }
    extract(Image.new("RGB", (64, 64), "red"), out, load_settings(options=options))
    return out


def changed(folder: Path, out: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a model's folder with other weights in one part."""
    shutil.copytree(folder, out)
    [file] = (out / part).glob("*.safetensors")
    save_file({name: change(one).contiguous() for name, one in load_file(file).items()}, file, {"format": "pt"})
    return out


@pytest.mark.parametrize("family", ["sdxl", "tabletop"])
def test_two_runs_of_a_model_of_any_family(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Those of Stable Diffusion are mixed below."""
    model = None if family == "tabletop" else request.getfixturevalue(f"{family}_folder")
    runs = {
        name: of_a_word(tmp_path / name, model, word=word, backbone=family)
        for name, word in (("a", "cup"), ("b", "ball"))
    }
    made = compose("a {a} of {b.material}", runs, n=1, out=tmp_path / "out")
    assert made.expanded == "a <a-cup-0-instance> <a-cup-0> of <b-ball-0-material>"
    with Image.open(made.images[0]) as picture:
        assert min(picture.size) >= 64


def test_a_fine_tune_and_its_base_are_mixed(sd_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first one's model draws, and it is said; a model kept in half precision is the same one."""
    tuned = changed(sd_folder, tmp_path / "tuned", "unet", lambda weights: weights + 0.05)
    half = changed(
        sd_folder, tmp_path / "half", "text_encoder", lambda one: one.half() if one.is_floating_point() else one
    )
    base, other, rounded = (
        of_a_word(tmp_path / f"run-{name}", folder)
        for name, folder in (("base", sd_folder), ("tuned", tuned), ("half", half))
    )
    first = compose("{a} {b}", {"a": base, "b": other}, n=1, out=tmp_path / "first")
    assert f"the images are drawn by sd21 with model {sd_folder}; b is of sd21 with model {tuned}" in caplog.text
    record = json.loads((tmp_path / "first" / "prompt.json").read_text())
    assert record["drawn_by"] == f"sd21 with model {sd_folder}"
    second = compose("{a} {b}", {"a": other, "b": base}, n=1, out=tmp_path / "second")
    assert first.images[0].read_bytes() != second.images[0].read_bytes()
    caplog.clear()
    alone = compose("{a}", {"a": rounded}, n=1, out=tmp_path / "alone")
    assert alone.images[0].is_file() and not caplog.text
    assert compose("{a} {b}", {"a": base, "b": rounded}, n=1, out=tmp_path / "rounded").images[0].is_file()


def test_models_that_read_tokens_otherwise_are_not_mixed(
    sd_folder: Path, sd15_folder: Path, sdxl_folder: Path, tmp_path: Path
) -> None:
    """Both are named."""
    runs = {
        name: of_a_word(tmp_path / name, folder, backbone=backbone)
        for name, folder, backbone in (("a", sd_folder, "sd21"), ("b", sd15_folder, "sd21"), ("c", sdxl_folder, "sdxl"))
    }
    names = {
        "a": f"sd21 with model {sd_folder}",
        "b": f"sd21 with model {sd15_folder}",
        "c": f"sdxl with model {sdxl_folder}",
    }
    for pair, more in (("ab", ", which are of one family but read tokens differently"), ("ac", ""), ("bc", "")):
        first, second = pair
        with pytest.raises(InputError) as error:
            compose(f"{{{first}}} {{{second}}}", {name: runs[name] for name in pair}, out=tmp_path / "out")
        assert str(error.value) == (
            f"{first} and {second} were learned with different backbones ({names[first]}, {names[second]}){more}: "
            "their tokens cannot be mixed"
        )
    assert not (tmp_path / "out").exists()


def test_families_of_one_text_encoder_are_not_mixed(runs: dict[str, Path], plugins: Plugins, tmp_path: Path) -> None:
    """What a token means depends on what reads the text encoder, too."""
    kept = {}
    for name, pipeline in (("one", "OnePipeline"), ("moved", "OtherPipeline")):
        kept[name] = Path(shutil.copytree(runs[name], tmp_path / name))
        manifest = json.loads((kept[name] / "manifest.json").read_text())
        manifest["backbone"] |= {"pipeline_class": pipeline, "pipeline_source": name}
        (kept[name] / "manifest.json").write_text(json.dumps(manifest))
    expected = r"different backbones \(plain with model plain, plain with model .*plain\): their tokens cannot be mixed"
    with pytest.raises(InputError, match=expected):
        compose("{a} {b}", {"a": kept["one"], "b": kept["moved"]}, installed=plugins)


def test_a_model_that_was_changed_between_two_runs(sd_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(sd_folder, tmp_path / "model"))
    before = of_a_word(tmp_path / "before", model)
    shutil.rmtree(model)
    changed(sd_folder, model, "text_encoder", lambda weights: -weights if weights.is_floating_point() else weights)
    after = of_a_word(tmp_path / "after", model)
    with pytest.raises(InputError, match=r"two states of sd21 with model .*, whose files were changed in between: "):
        compose("{a} {b}", {"a": before, "b": after}, out=tmp_path / "out")
