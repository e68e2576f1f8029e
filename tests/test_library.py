"""``icekit find``: concepts of many runs by word, attribute and similarity, as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plain_components as plain
import pytest
import torch
from icekit_process import in_this_process
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from icekit import ConceptLibrary, Extraction, InputError, extract, load_settings
from icekit.concept_library.index import Entry, Index, Query
from icekit.run import orchestrator
from icekit.run.directory import VECTORS, Located, RunDirectory

Icekit = Callable[..., tuple[int, str, str]]
NAMES = {**plain.NAMES, "retriever": "embedding"}


def make(folder: Path, *, located: Located | None = None, resume: bool = False, **values: Any) -> Extraction:
    names = {**NAMES, **values.pop("components", {})}
    options = {"components": names, "samples": 0, "exporters": [], "learner": {"steps": 2}, "max_concepts": 4, **values}
    image = Image.new("RGB", (40, 40), "red")
    return extract(
        image,
        folder,
        load_settings(options=options),
        installed=plain.beside_builtins(),
        resume=resume or located is not None,
        located=located,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of four concepts with vectors, and one of two without; all say other words of their attributes."""
    folder = tmp_path_factory.mktemp("runs")
    make(folder / "deep" / "one")
    shutil.copytree(folder / "deep" / "one", folder / "two words")
    make(folder / "bare", components={"retriever": "plain"}, max_concepts=2)
    says(folder / "deep" / "one", {0: ("red", "glass"), 1: ("green", "wood"), 2: ("blue", "glass"), 3: ("red", "clay")})
    says(folder / "two words", {0: ("blue", "metal"), 1: ("red", "wood"), 2: ("green", "clay"), 3: ("white", "wood")})
    says(folder / "bare", {0: ("grey", "glass"), 1: ("pink", "glass")})
    return folder


def says(run: Path, words: dict[int, tuple[str, str]]) -> None:
    """Let a run's manifest have these words, each before another one."""
    manifest = json.loads((run / "manifest.json").read_text())
    for concept in manifest["concepts"]:
        colour, material = words[concept["index"]]
        concept["words"] = {"colour": [colour, "black"], "material": ["plastic", material]}
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def icekit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Icekit:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return in_this_process(tmp_path, monkeypatch, capsys)


def references(out: str) -> list[str]:
    return [one["reference"] for one in json.loads(out)["found"]]


# --- What a run keeps -------------------------------------------------------------------------------------------------


def test_a_run_keeps_where_each_concept_is(made: Path, tmp_path: Path) -> None:
    run = Extraction.open(made / "deep" / "one")
    vectors = run.vectors()
    assert vectors is not None and vectors.space == "plain words" and vectors.rows.shape == (4, plain.DIM)
    for concept, row in zip(run.concepts, vectors.rows, strict=True):
        expected = plain.PlainTexts().embed([concept.label.replace("-", " ")])[0]
        assert np.array_equal(row, expected.numpy())
    assert VECTORS in run.manifest["files"] and VECTORS in (run.run_dir / "README.md").read_text()
    assert Extraction.open(made / "bare").vectors() is None
    again = make(tmp_path / "again")
    assert (again.run_dir / VECTORS).read_bytes() == (run.run_dir / VECTORS).read_bytes()


@pytest.mark.parametrize("stop_in", ["save_located", "save_learned"])
def test_a_killed_run_ends_with_the_same_vectors(
    stop_in: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Any] = []
    save = getattr(RunDirectory, stop_in)

    def stop(self: RunDirectory, *arguments: Any) -> None:
        saved.append(arguments)
        finished = stop_in != "save_located" or arguments[0].finished
        if finished:
            raise KeyboardInterrupt
        save(self, *arguments)

    with monkeypatch.context() as context:
        context.setattr(RunDirectory, stop_in, stop)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "run")
    if stop_in == "save_learned":  # stage one is over: nobody is asked again

        def refuse(*_: Any) -> None:
            raise AssertionError("embedded twice")

        monkeypatch.setattr(orchestrator, "embedded", refuse)
    make(tmp_path / "run", resume=True)
    assert (tmp_path / "run" / VECTORS).read_bytes() == (made / "deep" / "one" / VECTORS).read_bytes()


def test_vectors_of_other_regions_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(RunDirectory, "save_learned", stop)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "run")
    assert (tmp_path / "run" / VECTORS).is_file()
    found = RunDirectory(tmp_path / "run").load_located()
    corrected = replace(found, regions=found.regions[:1])
    run = make(tmp_path / "run", located=corrected)
    assert len(run.concepts) == 1 and run.vectors() is None and VECTORS not in run.manifest["files"]


@pytest.mark.parametrize(
    ("tensors", "metadata", "problem"),
    [
        ({"vectors": torch.ones(2, 3)}, {"space": "a"}, "float32 \\[4, D\\]"),
        ({"vectors": torch.ones(4, 3)}, {"space": "a"}, "length one"),
        ({"vectors": torch.full((4, 3), float("nan"))}, {"space": "a"}, "length one"),
        ({"vectors": torch.eye(4), "more": torch.ones(1)}, {"space": "a"}, "one tensor"),
        ({"vectors": torch.eye(4)}, {"space": "a\x1b[2J"}, "which space"),
        ({"vectors": torch.eye(4)}, {}, "which space"),
    ],
)
def test_vectors_of_others_are_looked_at(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], problem: str, runs: Path
) -> None:
    place = runs / "deep" / "one"
    save_file(tensors, place / VECTORS, metadata)
    with pytest.raises(InputError, match=problem) as error:
        Extraction.open(place).vectors()
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


# --- Finding ----------------------------------------------------------------------------------------------------------


def test_words_and_how_high_they_stand(icekit: Icekit, runs: Path) -> None:
    code, out, err = icekit("find", "red glass", "runs", "--words-alone", "--json")
    assert (code, err) == (0, "")
    # Both words first, red by a colour or by the label of a red bowl; then red, which stands first; then glass, second.
    found = references(out)
    assert set(found[:2]) == {"runs/deep/one:0", "runs/bare:1"}
    assert set(found[2:5]) == {"runs/deep/one:1", "runs/deep/one:3", "runs/two words:1"}
    assert set(found[5:]) == {"runs/deep/one:2", "runs/bare:0"}
    bowls = references(icekit("find", "Red-BOWL", "runs", "--words-alone", "--json")[1])
    assert set(bowls[:3]) == {f"runs/{run}:1" for run in ("deep/one", "two words", "bare")}


def test_similarity_ranks_what_words_leave_equal(icekit: Icekit, runs: Path) -> None:
    code, out, err = icekit("find", "vase", "runs", "--json", "--n", "20")
    assert code == 0 and "2 of 10 concepts are found by words alone: their runs have no vectors.safetensors" in err
    found = json.loads(out)["found"]
    assert [one["label"] for one in found[:2]] == ["vase", "vase"] and found[0]["similarity"] == pytest.approx(1)
    assert len(found) == 8  # all that have a vector
    similar = [one["similarity"] for one in found]
    assert similar == sorted(similar, reverse=True)
    expected = {
        label: float(plain.PlainTexts().embed([label, "vase"]).prod(dim=0).sum())
        for label in ("cup", "red bowl", "ball")
    }
    for one in found:
        if one["label"] != "vase":
            assert one["similarity"] == pytest.approx(expected[one["label"].replace("-", " ")], abs=1e-5)


def test_like_a_concept_without_a_model(icekit: Icekit, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(plain.EmbeddingRetriever, "text_encoder")
    code, out, err = icekit("find", "", "runs", "--like", "runs/deep/one:ball", "--json", "--n", "3")
    assert code == 0
    assert references(out)[0] == "runs/two words:3" and "runs/deep/one:3" not in references(out)
    code, out, err = icekit("find", "", "runs", "--like", "runs/deep/one:3", "--attribute", "color=red", "--json")
    assert code == 0 and set(references(out)) == {"runs/deep/one:0", "runs/two words:1"}
    code, out, err = icekit("find", "", "runs", "--like", "runs/bare:0")
    assert code == 2 and "runs/bare has no vectors.safetensors" in err and err.count("\n") == 1
    # Words are then found as words, and the answer says why.
    code, out, err = icekit("find", "red", "runs", "--json")
    assert code == 0 and len(references(out)) == 5 and "found by words alone: the retriever of these runs" in err


def test_another_clip_is_not_compared(icekit: Icekit, runs: Path) -> None:
    place = runs / "two words" / VECTORS
    with safe_open(place, framework="pt") as file:
        rows = file.get_tensor("vectors")
    save_file({"vectors": rows}, place, {"space": "another"})
    code, out, err = icekit("find", "", "runs", "--like", "runs/deep/one:0", "--json")
    assert code == 0 and "4 of 10 concepts are found by words alone: their vectors are another CLIP's" in err
    assert all(one.startswith("runs/deep/one:") for one in references(out)) and len(references(out)) == 3


def test_attributes(icekit: Icekit, runs: Path) -> None:
    def found(*options: str) -> set[str]:
        code, out, _ = icekit("find", *options, "--words-alone", "--json")
        assert code == 0
        return set(references(out))

    assert found("", "runs", "--attribute", "material=glass") == {
        "runs/deep/one:0", "runs/deep/one:2", "runs/bare:0", "runs/bare:1",
    }  # fmt: skip
    assert found("", "runs", "--attribute", "material=glass", "--attribute", "colour=Red") == {"runs/deep/one:0"}
    assert found("vase", "runs", "--attribute", "material=clay") == {"runs/two words:2"}
    assert found("", "runs/bare", "--attribute", "colour=glass") == set()


def test_the_table_can_be_pasted(icekit: Icekit, runs: Path) -> None:
    code, out, _ = icekit("find", "ball", "runs", "--n", "2")
    lines = out.splitlines()
    assert code == 0 and lines[0].split() == ["concept", "label", "colour", "material", "words", "similarity"]
    assert any("a='runs/two words:3'" in line for line in lines)
    code, out, err = icekit("compose", "a {a}", "a=runs/two words:3", "--n", "1", "--out", "made")
    assert code == 0, err


def test_a_run_and_folders_are_named_as_typed(icekit: Icekit, runs: Path) -> None:
    assert references(icekit("find", "cup", "runs/deep/one/", "--json", "--n", "1")[1]) == ["runs/deep/one:0"]
    assert references(icekit("find", "grey", "runs/bare", "--json")[1]) == ["runs/bare:0"]
    code, _, err = icekit("find", "cup", "nowhere")
    assert (code, err) == (2, "icekit: no such run directory: nowhere\n")
    (runs / "empty").mkdir()
    code, _, err = icekit("find", "cup", "runs/empty")
    assert code == 2 and "is neither a run directory nor a folder with runs in it" in err
    code, _, err = icekit("find", " ", "runs")
    assert code == 2 and "nothing to look for" in err
    code, _, err = icekit("find", "cup", "runs", "--attribute", "glass")
    assert code == 2 and "as in --attribute material=glass" in err
    code, out, err = icekit("find", "griffin", "runs", "--words-alone")
    assert (code, out) == (0, "") and "nothing was found" in err


# --- The index --------------------------------------------------------------------------------------------------------


def test_it_follows_the_runs(icekit: Icekit, runs: Path, tmp_path: Path) -> None:
    def found(words: str) -> list[str]:
        return references(icekit("find", words, "runs", "--words-alone", "--json", "--index", "own.sqlite")[1])

    assert found("vase") == ["runs/deep/one:2", "runs/two words:2"]
    shutil.rmtree(runs / "two words")
    assert found("vase") == ["runs/deep/one:2"]
    shutil.copytree(runs / "deep" / "one", runs / "three")
    says(runs / "three", dict.fromkeys(range(4), ("violet", "ice")))
    assert found("violet") == [f"runs/three:{number}" for number in range(4)]
    says(runs / "three", dict.fromkeys(range(4), ("amber", "ice")))
    assert found("violet") == [] and len(found("amber")) == 4
    (runs / "three" / "manifest.json").write_text("{")
    code, out, err = icekit("find", "amber", "runs", "--json", "--index", "own.sqlite")
    assert code == 0 and "passed over: the run in" in err and "is damaged: manifest.json" in err
    assert references(out) == references(icekit("find", "amber", "runs/deep", "--json")[1])
    assert (tmp_path / "own.sqlite").is_file()


def test_a_damaged_index_is_made_anew(icekit: Icekit, runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.sqlite"
    ask = ("find", "red glass", "runs", "--json", "--index", "own.sqlite")
    first = icekit(*ask)[1]
    whole = file.read_bytes()
    zeroed = whole[:200] + bytes(len(whole) - 200)
    another = whole[:60] + (99).to_bytes(4, "big") + whole[64:]  # user_version
    for damaged in (whole[: len(whole) // 2], zeroed, another, whole[:100] + os.urandom(len(whole) - 100)):
        file.write_bytes(damaged)
        code, out, err = icekit(*ask)
        assert (code, out) == (0, first), err
    Path("notes.txt").write_text("mine")
    code, _, err = icekit(*ask[:-1], "notes.txt")
    assert code == 2 and "notes.txt is no index of icekit's" in err and Path("notes.txt").read_text() == "mine"
    assert not (tmp_path / "cache").exists()
    # That in icekit's own folder is made anew whatever it is.
    assert icekit(*ask[:-2])[1] == first
    [cached] = (tmp_path / "cache").rglob("*.sqlite")
    cached.write_bytes(b"no database")
    assert icekit(*ask[:-2])[1] == first


def test_two_processes_at_one_index(runs: Path, tmp_path: Path) -> None:
    """Both opened it before either had put anything into it."""
    libraries = [ConceptLibrary(runs, index=tmp_path / "index", installed=plain.beside_builtins()) for _ in range(2)]
    one, other = (Index(tmp_path / "index") for _ in range(2))
    for library, index in zip(libraries, (one, other), strict=True):
        library._index = index
    found = [[hit.reference for hit in library.find("vase cup")] for library in libraries]
    assert found[0] == found[1] and len(found[0]) == 8 + 1
    shutil.rmtree(runs / "two words")
    assert len(ConceptLibrary(runs, index=tmp_path / "index", installed=plain.beside_builtins()).find("vase cup")) == 5


def test_without_a_place_for_a_cache(
    icekit: Icekit, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert references(icekit("find", "vase", "runs", "--words-alone", "--json")[1])[0] == "runs/deep/one:2"
    code, _, err = icekit("find", "vase", "runs", "--index", "file/index")
    assert code == 1 and "cannot write file/index" in err and err.count("\n") == 1


def test_many_equal_words_are_ranked_by_similarity(tmp_path: Path) -> None:
    """Of more concepts with the same words than are looked up one by one, the nearest are found, in order."""
    index, generator = Index(tmp_path / "index"), np.random.default_rng(0)
    rows = generator.standard_normal((3000, 16)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    with index.changing():
        for run in range(30):
            entries = [
                Entry(number, "cup" if number < 90 else "vase", {"colour": ["red"]}, rows[100 * run + number])
                for number in range(100)
            ]
            index.put(Path(f"/runs/{run}"), "", entries, "space [16]")
    query = Query(terms=("cup", "red"), vector=rows[5], space="space [16]")
    found = index.find(query, 40)
    cosines = rows @ rows[5]
    best = [number for number in np.argsort(-cosines, kind="stable") if number % 100 < 90][:40]
    assert [100 * int(one.place.name) + one.number for one in found] == best
    assert [one.similarity for one in found] == pytest.approx([float(cosines[number]) for number in best], abs=1e-5)
    alone = index.find(Query(vector=rows[7], space="space [16]", without=(Path("/runs/0"), 7)), 5)
    assert [100 * int(one.place.name) + one.number for one in alone] == list(np.argsort(-(rows @ rows[7])))[1:6]


# --- The page, and Python ---------------------------------------------------------------------------------------------


def test_the_page(icekit: Icekit, runs: Path) -> None:
    says(runs / "bare", {0: ("<script>alert(1)</script>", "glass"), 1: ("pink", "glass")})
    code, out, err = icekit("find", "<b> glass", "runs", "--page", "found.html")
    assert code == 0 and out.splitlines()[-1] == "found.html"
    page = Path("found.html").read_text()
    tags: list[tuple[str, dict[str, str | None]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))

    Reader().feed(page)
    assert "script" not in {tag for tag, _ in tags} and "b" not in {tag for tag, _ in tags}
    pictures = [str(one["src"]) for tag, one in tags if tag == "img"]
    assert len(pictures) == 10 and all(one.startswith("data:image/") and len(one) < 20_000 for one in pictures)
    assert "a=runs/deep/one:0" in page and "&lt;script&gt;alert(1)" in page
    assert not any("href" in one or str(one.get("src", "data:")).startswith("http") for _, one in tags)
    assert icekit("find", "glass", "runs", "--page", "found.html")[0] == 0  # its own is replaced
    Path("mine.html").write_text("<p>mine</p>")
    code, _, err = icekit("find", "glass", "runs", "--page", "mine.html")
    assert code == 2 and "mine.html is no page of icekit's" in err and Path("mine.html").read_text() == "<p>mine</p>"


def test_from_python(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = ConceptLibrary(runs, installed=plain.beside_builtins())
    assert len(library.places) == 3 and len(library) == 10
    assert repr(library).startswith("<ConceptLibrary of 3 runs: 0 cup, 1 red-bowl, 0 cup")
    found = library.find("red glass", attributes={"material": "glass"}, n=1)
    assert len(found) == 1 and found[0].reference == f"{runs}/deep/one:0" and found[0].matched == 2
    concept = found[0].concept()
    assert concept.label == "cup"
    assert [hit.label for hit in library.find(like=concept, n=1)] == ["cup"]
    with pytest.raises(InputError, match="nothing to look for"):
        library.find()
    with pytest.raises(InputError, match="n cannot be 0"):
        library.find("red", n=0)


def test_the_built_in_clip(clip_folder: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose retriever is ``clip`` keeps its CLIP's rows, and words are read by the same CLIP, without its run's
    backbone; when that model is gone, the answer says so.
    """
    from icekit.clip import ClipModel

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    values = {"model": str(folder), "vocabulary": ["cup", "vase", "ball"], "background": [], "max_similarity": 1.0}
    passes: list[int] = []
    look = ClipModel.embed_view

    def counted(self: ClipModel, *arguments: Any) -> torch.Tensor:
        passes.append(1)
        return look(self, *arguments)

    monkeypatch.setattr(ClipModel, "embed_view", counted)
    run = make(tmp_path / "runs" / "seen", components={"retriever": "clip"}, retriever=values, max_concepts=2)
    looked = len(passes)
    vectors = run.vectors()
    assert vectors is not None and vectors.space.startswith("clip ") and len(vectors.rows) == len(run.concepts)
    with monkeypatch.context() as context:  # the vectors themselves cost no pass
        context.setattr(orchestrator, "embedded", lambda *_: [torch.nn.functional.normalize(torch.ones(4), dim=0)] * 2)
        passes.clear()
        make(tmp_path / "unseen", components={"retriever": "clip"}, retriever=values, max_concepts=2)
    assert len(passes) == looked

    library = ConceptLibrary(tmp_path / "runs" / "seen", installed=plain.beside_builtins())
    found = library.find("griffin")
    assert not found.notes and len(found) == len(run.concepts)
    model = ClipModel(str(folder), "", torch.device("cpu"))
    text = model.embed_words(["griffin"], ("a photo of a {}",))[0].numpy()
    for hit in found:
        assert hit.similarity == pytest.approx(float(vectors.rows[hit.index] @ text), abs=1e-5)
    shutil.rmtree(folder)
    again = ConceptLibrary(tmp_path / "runs" / "seen", installed=plain.beside_builtins()).find("griffin")
    assert (
        not again.hits and "found by words alone: the CLIP of" in again.notes[0] and "is not at hand" in again.notes[0]
    )
