"""The report: complete, harmless whatever a run is called, and readable where a run left little."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from icekit_process import write_report
from PIL import Image
from safetensors.torch import load_file, save_file

from icekit.backbones.stable_diffusion import StableDiffusion
from icekit.backbones.stable_diffusion_xl import StableDiffusionXL
from icekit.protocols import FineTuning, InputError, Learned
from icekit.report import loss_chart
from icekit.report import page as report
from icekit.run.directory import RunDirectory
from icekit.run.log import LogLine, read_log
from icekit.run.ownership import EXPORTS
from icekit.run.records import Manifest

PARTS = ("category", "instance", "colour", "material")


class Page(HTMLParser):
    """What a browser would see of a page: tags with their attributes, text outside of style and script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "input", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags are closed in order"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read_page(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def write_run(run: Path, labels: list[str], size: int = 64, samples: int = 2, source: str = "photo.jpg") -> Path:
    """A finished run directory: a disc per concept on noise, each with samples and attention maps."""
    generator = np.random.default_rng(0)

    def save(pixels: Any, name: str) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(pixels).astype(np.uint8)).save(run / name)

    save(generator.integers(0, 256, (size, size, 3)), "image.png")
    rows, columns = np.mgrid[:size, :size]
    concepts = []
    for index, label in enumerate(labels):
        mask = (rows - size / 2) ** 2 + (columns - size * (index + 1) / (len(labels) + 1)) ** 2 < (size / 8) ** 2
        save(mask * 255, f"masks/{index}.png")
        for part in PARTS:
            save(generator.integers(0, 256, (16, 16)), f"attention/{index}-{part}.png")
        for part in (*PARTS, "object"):
            for k in range(samples):
                save(generator.integers(0, 256, (size, size, 3)), f"samples/{index}-{part}-{k}.png")
        stem = f"{re.sub('[<> ]', '', label)}-{index}"
        tokens = {part: f"<{stem}{'' if part == 'category' else '-' + part}>" for part in PARTS}
        words = {"colour": ["red", "orange"], "material": ["glass"]}
        concepts.append(
            {"index": index, "label": label, "score": 0.3, "mask": f"masks/{index}.png", "area": float(mask.mean())}
            | {"tokens": tokens, "words": words}
        )
    log = [
        {
            "step": step,
            "total": 40,
            "phase": "object" if step <= 20 else "attributes",
            "losses": {"attention": 1 / step},
        }
        for step in range(1, 41)
    ]
    (run / "log.jsonl").write_text("\n".join(json.dumps(line) for line in log))
    (run / "settings.toml").write_text("[learner]\nsteps = 40\n")
    manifest = {
        "schema_version": 2,
        "icekit_version": "0.1.0",
        "image": {"source": source, "sha256": "0" * 64, "width": size, "height": size},
        "backbone": {
            "identity": "x",
            "rows": {"clip_l": 4},
            "pipeline_class": "StableDiffusionPipeline",
            "pipeline_source": "my/model",
        },
        "components": {"backbone": "tabletop", "retriever": "clip", "segmentor": "xattn", "learner": "ice"},
        "attributes": ["colour", "material"],
        "seed": 7,
        "concepts": concepts,
        "timings": {"load_s": 1.2, "learn_s": 73.0},
    }
    write_manifest(run, manifest)
    return run


def write_manifest(run: Path, manifest: dict[str, Any]) -> None:
    """The manifest, with an embedding for every token of it."""
    tokens = [token for concept in manifest["concepts"] for token in concept["tokens"].values()]
    save_file({token: torch.zeros(4) for token in tokens}, run / "embeddings.safetensors")
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("size", [64, 512])
def test_a_complete_run(tmp_path: Path, size: int) -> None:
    run = write_run(tmp_path, ["cup", "tea pot", "ball"], size)
    path = write_report(run)
    page = read_page(path)
    assert path == run / "report.html"
    for text in ("photo.jpg", "cup", "tea pot", "<ball-2-material>", "tabletop", "1 min 14 s", "orange"):
        assert text in page.text
    # One picture, and per concept a cut-out, four attention maps and five pairs of samples, all with a description.
    images = page.all("img")
    assert len(images) == 1 + 3 * (1 + 4 + 5 * 2)
    assert all(image["alt"] and (image["src"] or "").startswith("data:image/") for image in images)
    assert [outline["d"] for outline in page.all("path") if outline.get("class") == "line"]
    assert 'from_pretrained("my/model")' in page.text
    assert f"a={run}:0" in page.text
    assert len(page.all("h1")) == 1


def test_what_the_words_alone_would_have_given(tmp_path: Path) -> None:
    run = write_run(tmp_path, ["cup"])
    manifest = json.loads((run / "manifest.json").read_text())
    before = read_page(write_report(run))
    assert "words alone" not in before.text  # a run of before there were any
    assert "presets" not in before.text

    manifest |= {"presets": ["tabletop", "published"], "learning_steps": 1100}
    manifest["concepts"][0]["words_alone"] = {"object": "white cup", "colour": "white cup", "material": "cup"}
    manifest["concepts"][0]["described"] = {"colour": ["white", "grey"]}
    write_manifest(run, manifest)
    for part in ("object", "colour"):
        for number in range(2):
            Image.new("RGB", (64, 64), "white").save(run / "samples" / f"0-{part}-words-{number}.png")
    page = read_page(write_report(run))
    assert len(page.all("img")) == len(before.all("img")) + 4
    assert sum(image["alt"] == "Generated with the words white cup, sample 1" for image in page.all("img")) == 2
    text = " ".join(page.text.split())
    for said in ("words alone: white, grey", "words alone: none for its material"):
        assert said in text
    for fact in ("presetstabletop, published", "learning steps1100"):
        assert fact in text
    assert "the difference is what learning added" in text

    for file in (run / "samples").glob("*-words-*.png"):
        file.unlink()
    manifest["presets"] = []
    write_manifest(run, manifest)
    page = read_page(write_report(run))
    assert len(page.all("img")) == len(before.all("img"))
    assert "the difference is what learning added" not in page.text
    assert "presetsnone" in " ".join(page.text.split())


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_the_diffusers_snippet_runs_as_it_stands(tmp_path: Path, sd_folder: Path, fine_tuned: bool) -> None:
    """With what the backbone says of how its model is loaded."""
    backbone = StableDiffusion(StableDiffusion.Settings(model=str(sd_folder)), "cpu")
    run = write_run(tmp_path, ["cup"], samples=0)
    [(encoder, dim)] = backbone.rows.items()
    config = json.loads((sd_folder / "unet" / "config.json").read_text())
    own = load_file(sd_folder / "unet" / "diffusion_pytorch_model.safetensors")
    weights = {name: torch.zeros_like(value, dtype=torch.float16) for name, value in own.items()}
    tuning = FineTuning(weights=weights, weights_config=config) if fine_tuned else FineTuning()
    tokens = {f"<cup-0{end}>": {encoder: torch.ones(dim)} for end in ("", "-instance")}
    RunDirectory(run).save_learned(Learned(tokens, tuning))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["backbone"] = {
        "identity": backbone.identity,
        "rows": dict(backbone.rows),
        "pipeline_class": backbone.pipeline_class,
        "pipeline_source": backbone.pipeline_source,
    }
    html = report.render_report(run, Manifest.model_validate(manifest))
    found = re.search(r"from pathlib.*?images\[0\]", Page(html).text, re.DOTALL)
    assert found
    scope: dict[str, Any] = {}
    exec(found[0].replace(").images", ", num_inference_steps=1).images"), scope)  # one step: it is only to run
    assert isinstance(scope["image"], Image.Image)
    assert "<cup-0-instance>" in scope["pipe"].tokenizer.get_vocab()
    assert any(bool(value.any()) for value in scope["pipe"].unet.parameters()) != fine_tuned


def test_the_diffusers_snippet_of_two_text_encoders(tmp_path: Path, sdxl_folder: Path) -> None:
    """It runs as it stands, and the picture is icekit's."""
    backbone = StableDiffusionXL(StableDiffusionXL.Settings(model=str(sdxl_folder), image_size=128, steps=3), "cpu")
    run = write_run(tmp_path, ["cup"], samples=0)
    names = ("<cup-0>", "<cup-0-instance>", "<cup-0-colour>", "<cup-0-material>")
    rows = {
        name: {encoder: torch.full((dim,), 0.02 * place) for encoder, dim in backbone.rows.items()}
        for place, name in enumerate(names, 1)
    }
    RunDirectory(run).save_learned(Learned(rows))
    manifest = json.loads((run / "manifest.json").read_text())
    facts = ("identity", "rows", "pipeline_class", "pipeline_source", "pipeline_encoders")
    manifest["backbone"] = json.loads(json.dumps({name: getattr(backbone, name) for name in facts}))
    html = report.render_report(run, Manifest.model_validate(manifest))
    found = re.search(r"from pathlib.*?images\[0\]", Page(html).text, re.DOTALL)
    assert found
    scope: dict[str, Any] = {"torch": torch, "Sampler": DPMSolverMultistepScheduler}
    how = "num_inference_steps=3, guidance_scale=5.0, generator=torch.Generator().manual_seed(1)"
    sampler = "pipe.scheduler = Sampler.from_config(pipe.scheduler.config)\nimage = pipe("
    exec(found[0].replace("image = pipe(", sampler).replace(").images", f", {how}).images"), scope)
    prompt = found[0].partition('image = pipe(prompt="')[2].partition('"')[0]
    [own] = backbone.generate([prompt], seeds=[1], tokens=rows)
    assert np.abs(np.asarray(own, float) - np.asarray(scope["image"], float)).max() <= 1


@pytest.mark.parametrize(
    "backbone",
    [
        None,  # as a run of schema version 1 has it
        {"identity": "x", "rows": {"clip_l": 4}},
        {"identity": "x", "rows": {"clip_l": 4}, "pipeline_class": "a; b", "pipeline_source": "my/model"},
        {"identity": "x", "rows": {"clip_l": 4, "clip_g": 4}, "pipeline_class": "P", "pipeline_source": "my/model"},
        {
            "identity": "x",
            "rows": {"clip_l": 4, "clip_g": 4},
            "pipeline_class": "P",
            "pipeline_source": "my/model",
            "pipeline_encoders": {"clip_l": ["tokenizer", "text_encoder"], "clip_g": ["tokenizer_2", "x); import os"]},
        },
        {
            "identity": "x",
            "rows": {"clip_l": 4, "clip_g": 4},
            "pipeline_class": "P",
            "pipeline_source": "my/model",
            "pipeline_encoders": {"clip_l": ["tokenizer", "text_encoder"], "clip_g": ["tokenizer_2"]},
        },
    ],
)
def test_no_code_is_shown_that_would_not_run(tmp_path: Path, backbone: dict[str, Any] | None) -> None:
    run = write_run(tmp_path, ["cup"])
    manifest = json.loads((run / "manifest.json").read_text()) | {"backbone": backbone}
    manifest["schema_version"] = 1 if backbone is None else 2
    page = Page(report.render_report(run, Manifest.model_validate(manifest)))
    assert "from_pretrained" not in page.text and "diffusers" not in page.text
    assert "icekit compose" in page.text


def test_a_picture_of_two_sides(tmp_path: Path) -> None:
    run = write_run(tmp_path, ["cup"], 64)
    for path in [run / "image.png", *(run / "masks").iterdir(), *(run / "samples").iterdir()]:
        with Image.open(path) as picture:
            picture.crop((0, 0, 64, 48)).save(path)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["image"]["height"] = 48
    write_manifest(run, manifest)
    page = read_page(write_report(run))
    assert [outline["d"] for outline in page.all("path") if outline.get("class") == "line"]
    sizes = {image["alt"]: (image["width"], image["height"]) for image in page.all("img")}
    assert sizes["The image as the run saw it: photo.jpg"] == ("1024", "768")
    assert sizes["Generated with <cup-0-colour>, sample 1"] == ("64", "48")


def test_nothing_outside_is_asked_for(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path, ["cup"]))
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/")), value
    assert "url(http" not in html
    assert "@import" not in html
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script and policy
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'; --c: url(//x)"])
def test_names_from_a_run_are_harmless(tmp_path: Path, evil: str) -> None:
    run = write_run(tmp_path, [evil], source=f"{evil}.jpg".replace("/", "-"))
    manifest = json.loads((run / "manifest.json").read_text())
    concept = manifest["concepts"][0]
    concept["words"] = {"colour": [evil, evil], evil: [evil]}
    concept["tokens"][evil] = f"<{re.sub('[<> ]', '', evil)}>"
    manifest["components"][evil] = manifest["icekit_version"] = evil
    manifest["timings"][evil] = 1.0
    manifest["image"]["sha256"] = evil
    write_manifest(run, manifest)
    (run / "settings.toml").write_text(f"# {evil}\n")
    (run / "log.jsonl").write_text(json.dumps({"step": 1, "phase": evil, "losses": {evil: 1.0}}))
    page = read_page(write_report(run))
    assert evil in page.text
    assert len(page.all("script")) == 1
    assert all((image["src"] or "").startswith("data:") for image in page.all("img"))
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    allowed = re.compile(r"--c: #[0-9a-f]{6}(; left: [\d.]+%; top: [\d.]+%)?")
    assert all(allowed.fullmatch(attributes["style"] or "") for _, attributes in page.tags if "style" in attributes)


def test_what_a_run_warned_of_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path, ["cup"])
    manifest = json.loads((run / "manifest.json").read_text())
    write_manifest(run, manifest | {"warnings": ["photo.jpg is unlike all that <b>it</b> knows"]})
    assert "photo.jpg is unlike all that <b>it</b> knows" in read_page(write_report(run)).text


def test_a_bare_run(tmp_path: Path) -> None:
    """Only a manifest and the tokens: what is not there is left out."""
    manifest = {
        "schema_version": 2,
        "icekit_version": "0.1.0",
        "image": {"source": "photo.jpg", "sha256": "", "width": 8, "height": 8},
        "backbone": {"identity": "x", "rows": {"clip_l": 4}},
        "concepts": [
            {"index": 0, "label": "cup", "score": 0.3, "area": 0.1, "mask": "masks/0-cup.png"}
            | {"tokens": {"category": "<cup-0>"}, "words": {}}
        ],
    }
    write_manifest(tmp_path, manifest)
    page = read_page(write_report(tmp_path))
    assert page.all("img") == []
    assert page.all("svg") == []
    assert "Losses" not in page.text
    assert "<cup-0>" in page.text


def test_no_concepts(tmp_path: Path) -> None:
    page = read_page(write_report(write_run(tmp_path, [])))
    assert "No concept was found" in page.text
    assert "icekit compose" not in page.text


def test_no_samples_and_an_empty_mask(tmp_path: Path) -> None:
    run = write_run(tmp_path, ["cup"], samples=0)
    Image.new("L", (64, 64)).save(run / "masks" / "0.png")
    page = read_page(write_report(run))
    assert "what it makes" not in page.text
    assert [outline for outline in page.all("path") if outline.get("class") == "line"] == []


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_replaced_and_leaves_nothing_else(tmp_path: Path) -> None:
    run = write_run(tmp_path, ["cup"])
    before = {path.name for path in run.iterdir()}
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert {path.name for path in run.iterdir()} == before | {"report.html", EXPORTS}


def test_a_mask_outside_the_run_is_not_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["cup"])
    Image.new("L", (64, 64), 255).save(tmp_path / "secret.png")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["concepts"][0]["mask"] = "../secret.png"
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"concepts\.0\.mask: should be a file inside the directory"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_samples_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path, ["cup"], samples=0)
    (run / "samples").mkdir()
    for k in range(11):
        Image.new("RGB", (64, 64), (k, 0, 0)).save(run / "samples" / f"0-colour-{k}.png")
    page = read_page(write_report(run))
    sources = [str(image["src"]) for image in page.all("img") if "colour" in str(image["alt"])][1:]
    shades = [
        Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB").getpixel((0, 0))
        for source in sources
    ]
    assert shades == [(k, 0, 0) for k in range(11)]


def test_outline_of_one_pixel() -> None:
    """Half-way between the centre of the pixel (2, 1) and those of its neighbours: a diamond."""
    mask = np.zeros((4, 4), dtype=bool)
    mask[1, 2] = True
    outline = report.mask_outline(mask)
    points = {tuple(map(float, point.split())) for point in outline.strip("MZ").split("L")}
    assert points == {(2.5, 1.0), (3.0, 1.5), (2.5, 2.0), (2.0, 1.5)}


def test_outline_of_a_ring_has_two_parts_and_its_number_stands_on_it() -> None:
    rows, columns = np.mgrid[:64, :64]
    radius = np.hypot(rows - 31.5, columns - 31.5)
    ring = (radius < 25) & (radius > 10)
    assert report.mask_outline(ring).count("M") == 2
    x, y = report.label_point(ring)
    assert ring[int(y), int(x)]
    assert report.mask_outline(np.zeros((8, 8), dtype=bool)) == ""


def test_cut_out_is_transparent_outside_the_mask() -> None:
    image = Image.new("RGB", (64, 64), "red")
    mask = np.zeros((64, 64), dtype=bool)
    mask[20:30, 40:50] = True
    cut = report.cut_out(image, mask)
    assert cut is not None
    assert cut.width == cut.height < 20
    assert np.asarray(cut)[..., 3].sum() == 255 * 100
    assert report.cut_out(image, np.zeros_like(mask)) is None


def test_heat_is_brightest_where_the_attention_is() -> None:
    attention = np.zeros((4, 4), dtype=np.uint8)
    attention[0, 3] = 200
    overlay = report.heat_overlay(Image.new("RGB", (64, 64), "grey"), Image.fromarray(attention), side=64)
    light = np.asarray(overlay.convert("L")).astype(int)
    assert light[:16, 48:].mean() > light[48:, :16].mean() + 60
    flat = report.heat_overlay(Image.new("RGB", (64, 64)), Image.new("L", (4, 4), 90))
    assert flat.size == (report.THUMBNAIL_SIDE, report.THUMBNAIL_SIDE)


def test_white_numbers_are_legible_on_every_colour() -> None:
    for colour in report.COLOURS:
        channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        assert 1.05 / (linear @ [0.2126, 0.7152, 0.0722] + 0.05) >= 4.5, colour


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (270, "4 min 30 s"), (3900, "1 h 5 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_log_lines_of_both_shapes_and_damaged_ones(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 2, "phase": "a", "losses": {"x": 2.0, "y": NaN}}\n'
        '{"step": 1, "total": 3, "phase": "a", "x": 1.0, "note": "text"}\n'
        '{"step": 2, "phase": "b", "losses": {"x": 3.0}}\n'
        "[]\n\n"
        '{"step": 3, "pha'
    )
    lines, passed_over = read_log(RunDirectory(tmp_path).files)
    assert lines == [
        LogLine(1, "a", {"x": 1.0}),
        LogLine(2, "b", {"x": 3.0}),
    ]
    assert passed_over == 1  # the last line was being written when the process was killed
    log.unlink()
    assert read_log(RunDirectory(tmp_path).files) == ([], 0)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.5, 1]), (1, 800, [200, 400, 600, 800]), (-3e-5, 3e-5, [-2e-5, 0, 2e-5])],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert loss_chart.nice_ticks(low, high, 4 if high == 800 else 3) == pytest.approx(ticks)


def test_smoothing_keeps_a_straight_line_and_zeros() -> None:
    line = np.linspace(0.0, 1.0, 240)
    assert loss_chart.smooth(line)[20:-20] == pytest.approx(line[20:-20])
    assert (loss_chart.smooth(np.concatenate([line, np.zeros(240)]))[300:] == 0).all()


def test_thinning_keeps_the_extremes() -> None:
    y = np.zeros(10_000)
    y[1234], y[5678] = 5, -5
    x, thinned = loss_chart.thin(np.arange(10_000.0), y)
    assert len(x) <= loss_chart.MAX_POINTS
    assert (np.diff(x) > 0).all()
    assert {5.0, -5.0} <= set(thinned)


def test_charts_break_at_phases_and_stay_in_their_frame() -> None:
    log = [
        LogLine(step, "one" if step <= 500 else "two", {"a": 1 / step} | ({"b": 2.0} if step > 500 else {}))
        for step in range(1, 1001)
    ]
    first, second = loss_chart.loss_charts(log)
    assert (first.name, second.name) == ("a", "b")
    assert first.smooth.count("M") == 2
    assert second.smooth.count("M") == 1
    assert [band.name for band in first.bands] == ["one", "two"]
    assert [change.phase for change in first.changes] == ["one", "two"]
    assert second.changes == [loss_chart.Change("two", "2", "2", "")]
    for chart in (first, second):
        places = np.array(re.findall(r"([\d.-]+) ([\d.-]+)", chart.smooth), dtype=float)
        assert places[:, 0].min() >= loss_chart.LEFT and places[:, 0].max() <= loss_chart.RIGHT
        assert places[:, 1].min() >= loss_chart.TOP - 0.1 and places[:, 1].max() <= loss_chart.BOTTOM + 0.1
    assert len(first.raw) < 12 * 2 * loss_chart.MAX_POINTS + 100


def test_a_loss_is_compared_within_its_phase_and_its_scatter() -> None:
    """Falls in the first phase, rises in the second, and in the third only jumps up and down."""
    values = [9, 8, 7.5, 6, 5, 4, 20, 21, 22.5, 23, 24, 26, 1, 9, 2, 8, 1.5, 8.5]
    log = [LogLine(step + 1, "abc"[step // 6], {"x": float(value)}) for step, value in enumerate(values)]
    (chart,) = loss_chart.loss_charts(log)
    assert [(change.phase, change.trend) for change in chart.changes] == [("a", "falls"), ("b", "rises"), ("c", "")]


def test_a_chart_of_one_step() -> None:
    (chart,) = loss_chart.loss_charts([LogLine(1, "", {"a": 0.0})])
    assert chart.raw.count("L") == 1
