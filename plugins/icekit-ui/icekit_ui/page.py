"""The page: three steps, Find, Learn and Mix, and the runs that there are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from icekit import InputError, load_image
from icekit_ui import fragments
from icekit_ui.looking import BEGUN, COMPLETE, DAMAGED, FOUND, LOOKING, Seen, Thing, look, signature
from icekit_ui.masks import from_lengths, to_lengths
from icekit_ui.runs import MIXES, Run
from icekit_ui.studio import FINDING, LEARNING, Outline, Studio

FILES = Path(__file__).parent / "page_files"
LISTED = 48
"""Runs in the list of earlier ones."""
REMEMBERED = 64
"""Runs of which is kept in memory what was read."""
MOST_PICTURES = 16
MAX_WORD = 60
EVERY_S = 1.0
NEXT = {
    LOOKING: "Go on looking",
    FOUND: "Learn these objects",
    BEGUN: "Go on learning",
    COMPLETE: "Learn again as corrected",
    DAMAGED: "Learn these objects",
}
NOTHING = Seen("", LOOKING)


@dataclass
class Session:
    """What one browser's page is about.

    run: the one that is shown. dropped: a picture that waits to be looked at, and the stem of its file's name.
    outlines: the objects as corrected; None: as they were found. chosen: the object that is being corrected.
    names: what stands for a concept in the prompt -> its run's name and its index. mix, asked: the composition that is
    shown, and its prompt and number of pictures. mixing: the runs whose concepts are offered. offered: the run that was
    put there when it was learned. sent: what the page has, by component.
    """

    run: str = ""
    dropped: tuple[Image.Image, str] | None = None
    outlines: list[Outline] | None = None
    chosen: int = 0
    names: dict[str, tuple[str, int]] = field(default_factory=dict)
    mixing: list[str] = field(default_factory=list)
    offered: str = ""
    mix: str = ""
    asked: tuple[str, int] = ("", 0)
    note: str = ""
    problem: str = ""
    sent: dict[str, Any] = field(default_factory=dict)


def _picks(label: str) -> gr.HTML:
    """HTML whose elements with ``data-pick`` are buttons: the event ``pick``.

    It is a function, for Gradio writes a file beside the module of each subclass of its components.
    """
    return gr.HTML(label=label, js_on_load=(FILES / "picks.js").read_text())


def _one_line(word: object) -> str:
    """A word as its field holds it."""
    return " ".join(str(word or "").split())[:MAX_WORD]


class Page:
    """The page of one studio."""

    def __init__(self, studio: Studio, uploads: Path) -> None:
        """Make it.

        uploads: the folder that pictures come into which a browser sends.
        """
        self.studio, self.uploads = studio, uploads.resolve()
        self._seen: dict[str, tuple[tuple[Any, ...], Seen]] = {}
        self._thumbnails: dict[tuple[str, int], Image.Image | None] = {}
        self.parts: dict[str, Any] = {}

    # --- Its parts ---------------------------------------------------------------------------------------------------

    def blocks(self) -> gr.Blocks:
        """The page, for Gradio to serve."""
        parts = self.parts
        settings = self.studio.settings
        attributes = list(self.studio.plugins.offered("attribute"))
        # Nobody writes statistics or asks for a newer version.
        with gr.Blocks(title="icekit", analytics_enabled=False, fill_width=False) as page:
            session = gr.State(Session())
            gr.Markdown(
                "# icekit\nFind the objects of a picture, learn tokens for each and for its colour and material, and "
                "mix them in new pictures."
            )
            parts["runs"] = _picks("Runs")
            parts["message"] = gr.HTML(visible=False)
            with gr.Row(equal_height=False):
                parts["progress"] = gr.HTML(min_width=200, scale=4, visible=False)
                parts["stop"] = gr.Button("Stop", variant="stop", visible=False, min_width=90, scale=0)
            with gr.Tabs(selected="find") as tabs:
                parts["tabs"] = tabs
                with gr.Tab("1 Find", id="find"):
                    self._find_tab(attributes)
                with gr.Tab("2 Learn", id="learn"):
                    parts["learn_head"] = gr.HTML()
                    parts["go_on"] = gr.Button("Learn these objects", variant="primary", visible=False)
                    parts["curves"] = gr.HTML()
                    parts["concepts"] = gr.HTML()
                    parts["samples"] = gr.HTML()
                with gr.Tab("3 Mix", id="mix"):
                    self._mix_tab(settings.seed)
            timer = gr.Timer(EVERY_S)
            self._wire(page, session, timer)
        return page

    def _find_tab(self, attributes: list[str]) -> None:
        parts, settings = self.parts, self.studio.settings
        with gr.Row(equal_height=False):
            with gr.Column(min_width=280):
                parts["drop"] = gr.File(
                    label="Drop a picture here, or click to choose one", file_types=["image"], height=160
                )
                with gr.Accordion("Settings of the new run", open=False):
                    parts["attributes"] = gr.CheckboxGroup(
                        attributes, value=list(settings.attributes), label="Attributes to learn"
                    )
                    parts["most"] = gr.Number(
                        settings.max_concepts, label="Objects at most", precision=0, minimum=1, maximum=10_000
                    )
                    parts["seed"] = gr.Number(settings.seed, label="Seed", precision=0, minimum=0)
                parts["find"] = gr.Button("Find objects", variant="primary", interactive=False)
            with gr.Column(min_width=280):
                parts["picture"] = _picks("The picture and its objects")
                parts["legend"] = gr.HTML()
                parts["learn"] = gr.Button("Learn these objects", variant="primary", visible=False)
        with gr.Column(visible=False) as correct:
            parts["correct"] = correct
            gr.Markdown("### Correct a word or an outline\nWhat you change is used when learning starts.")
            with gr.Row(equal_height=False):
                with gr.Column(min_width=280):
                    parts["object"] = gr.Radio([], label="Object", type="value")
                    parts["word"] = gr.Textbox(
                        label="Word", placeholder="empty: the program names it", max_length=MAX_WORD
                    )
                    with gr.Row():
                        parts["remove"] = gr.Button("Remove this object", min_width=120)
                        parts["add"] = gr.Button("Add an object", min_width=120)
                with gr.Column(min_width=280):
                    parts["painter"] = gr.HTML(
                        None,
                        label="Outline",
                        html_template='<div class="ik-painter"></div>',
                        js_on_load=(FILES / "painter.js").read_text(),
                    )

    def _mix_tab(self, seed: int) -> None:
        parts = self.parts
        parts["mix_runs"] = gr.Dropdown([], value=[], multiselect=True, label="Take concepts of these runs")
        parts["chips"] = _picks("Concepts")
        parts["prompt"] = gr.Textbox(
            label="Prompt", placeholder="click on concepts above, and write words between them", max_length=1000
        )
        parts["bound"] = gr.HTML()
        with gr.Row():
            parts["count"] = gr.Number(
                4, label="Pictures", precision=0, minimum=1, maximum=MOST_PICTURES, min_width=100
            )
            parts["mix_seed"] = gr.Number(seed, label="Seed", precision=0, minimum=0, min_width=100)
        with gr.Row():
            parts["mix"] = gr.Button("Draw", variant="primary", min_width=120)
            parts["clear"] = gr.Button("Clear the prompt", min_width=120)
        parts["mixed"] = gr.HTML()

    def _wire(self, page: gr.Blocks, session: gr.State, timer: gr.Timer) -> None:
        parts = self.parts
        everything = [session, *parts.values()]

        def on(listen: Callable[..., Any], handler: Callable[..., Any], *inputs: str, **options: Any) -> None:
            """One event. All are handled one after another, which they can be: none of them takes long."""
            listen(
                handler,
                [session, *(parts[name] for name in inputs)],
                everything,
                show_progress="hidden",
                concurrency_id="page",
                concurrency_limit=1,
                api_visibility="private",
                **options,
            )

        on(page.load, self._tick)
        on(timer.tick, self._tick, trigger_mode="once")
        on(parts["runs"].pick, self._open)
        on(parts["stop"].click, self._stop)
        on(parts["drop"].upload, self._drop, "drop")
        on(parts["find"].click, self._find, "attributes", "most", "seed")
        on(parts["picture"].pick, self._choose_in_picture)
        on(parts["object"].input, self._choose, "object")
        for listen in (parts["word"].submit, parts["word"].blur):
            on(listen, self._rename, "word")
        on(parts["remove"].click, self._remove)
        on(parts["add"].click, self._add)
        on(parts["painter"].keep, self._paint)
        on(parts["learn"].click, self._learn, "word")
        on(parts["go_on"].click, self._learn, "word")
        on(parts["mix_runs"].input, self._take_runs, "mix_runs")
        on(parts["chips"].pick, self._insert, "prompt")
        on(parts["clear"].click, self._clear)
        for listen in (parts["mix"].click, parts["prompt"].submit):
            on(listen, self._mix, "prompt", "count", "mix_seed")

    # --- What a person does ------------------------------------------------------------------------------------------

    def _acted(self, session: Session, act: Callable[[], str | None], **more: Mapping[str, Any]) -> dict[Any, Any]:
        """Do something, and show what came of it, or why it cannot be done. What it returns is said to the person."""
        session.problem = session.note = ""
        try:
            session.note = act() or ""
        except InputError as error:
            session.problem, more = str(error), {}
        return self._shown(session, more)

    def _tick(self, session: Session) -> dict[Any, Any]:
        return self._shown(session)

    def _open(self, session: Session, event: gr.EventData) -> dict[Any, Any]:
        def act() -> None:
            self._show(session, self.studio.runs.find(getattr(event, "pick", "")).name)

        return self._acted(session, act)

    def _show(self, session: Session, name: str) -> None:
        session.run, session.outlines, session.chosen, session.dropped = name, None, 0, None
        if self.studio.runs.find(name).complete and name not in session.mixing:
            session.mixing.append(name)

    def _stop(self, session: Session) -> dict[Any, Any]:
        return self._acted(session, self.studio.stop)

    def _drop(self, session: Session, file: object) -> dict[Any, Any]:
        def act() -> str:
            path = Path(str(file)).resolve()
            if not path.is_relative_to(self.uploads):
                raise InputError("a picture has to be sent to the page")
            try:
                source = load_image(path)
            except InputError as error:
                raise InputError(str(error).replace(str(path), path.name)) from error
            finally:
                path.unlink(missing_ok=True)
            session.dropped = (source.picture, source.stem)
            session.run, session.outlines, session.chosen = "", None, 0
            return f"{path.name}: {source.picture.width} x {source.picture.height} pixels. Now find its objects."

        return self._acted(session, act, drop={"value": None})

    def _find(self, session: Session, attributes: Any, most: Any, seed: Any) -> dict[Any, Any]:
        def act() -> None:
            if session.dropped is None:
                raise InputError("drop a picture first")
            choices = {"attributes": tuple(attributes or ()), "max_concepts": most, "seed": seed}
            name = self.studio.find(*session.dropped, choices)
            session.run, session.outlines, session.chosen, session.dropped = name, None, 0, None

        return self._acted(session, act)

    def _choose_in_picture(self, session: Session, event: gr.EventData) -> dict[Any, Any]:
        return self._choose(session, getattr(event, "pick", ""))

    def _choose(self, session: Session, chosen: object) -> dict[Any, Any]:
        def act() -> None:
            number = re.match(r"\d{1,6}", str(chosen))
            if number is None or int(number.group()) >= len(self._outlines(session)):
                raise InputError(f"there is no object {str(chosen)[:40]!r}")
            session.chosen = int(number.group())

        return self._acted(session, act)

    def _rename(self, session: Session, word: object) -> dict[Any, Any]:
        return self._acted(session, lambda: self._take_word(session, word))

    def _take_word(self, session: Session, word: object) -> None:
        outlines = self._outlines(session)
        if session.chosen >= len(outlines):
            return
        one = outlines[session.chosen]
        said, before = _one_line(word), _one_line(one.word)
        if said != before:
            outlines[session.chosen] = Outline(said or None, one.mask)
            session.outlines = outlines

    def _paint(self, session: Session, event: gr.EventData) -> dict[Any, Any]:
        def act() -> None:
            outlines, picture = self._outlines(session), self._picture(session)
            number = getattr(event, "object", None)
            if picture is None or type(number) is not int or not 0 <= number < len(outlines):
                raise InputError("there is no such object to outline")
            mask = from_lengths(getattr(event, "mask", None), *picture.size)
            outlines[number] = Outline(outlines[number].word, mask)
            session.outlines = outlines
            self._note_painted(session, number)

        return self._acted(session, act)

    def _note_painted(self, session: Session, number: int) -> None:
        """The painter has this outline already: it made it."""
        session.sent["painter"] = {"value": self._painter(session)} if session.chosen == number else None

    def _remove(self, session: Session) -> dict[Any, Any]:
        def act() -> None:
            outlines = self._outlines(session)
            if len(outlines) < 2:
                raise InputError("a run needs an object: outline another one before you remove this one")
            del outlines[min(session.chosen, len(outlines) - 1)]
            session.outlines, session.chosen = outlines, 0

        return self._acted(session, act)

    def _add(self, session: Session) -> dict[Any, Any]:
        def act() -> str:
            outlines, picture = self._outlines(session), self._picture(session)
            if picture is None:
                raise InputError("there is no picture to outline an object in")
            outlines.append(Outline(None, np.zeros(picture.size[::-1], dtype=bool)))
            session.outlines, session.chosen = outlines, len(outlines) - 1
            return "Paint the new object below, and give it a word if you like."

        return self._acted(session, act)

    def _learn(self, session: Session, word: object) -> dict[Any, Any]:
        def act() -> None:
            if not session.run:
                raise InputError("find objects first, or open a run")
            run = self.studio.runs.find(session.run)
            seen = self._look(run)
            if seen.state in (FOUND, BEGUN, COMPLETE) and session.sent.get("correct", {}).get("visible"):
                self._take_word(session, word)
            corrected = session.outlines
            if corrected is not None:
                corrected = [one for one in corrected if one.mask.any()]
            name = self.studio.learn(run, corrected)
            session.run, session.outlines, session.chosen = name, None, 0

        return self._acted(session, act, tabs={"selected": "learn"})

    def _take_runs(self, session: Session, names: object) -> dict[Any, Any]:
        def act() -> None:
            wanted = names if isinstance(names, list) else []
            session.mixing = [self.studio.runs.find(name).name for name in wanted[:LISTED]]

        return self._acted(session, act)

    def _insert(self, session: Session, prompt: object, event: gr.EventData) -> dict[Any, Any]:
        written: dict[str, Any] = {}

        def act() -> None:
            run = self.studio.runs.find(getattr(event, "run", ""))
            index, _, part = str(getattr(event, "pick", "")).partition(":")
            thing = next((one for one in self._look(run).things if str(one.index) == index), None)
            if thing is None or (part and part not in thing.tokens):
                raise InputError("there is no such concept")
            name = self._name_for(session, run.name, thing.index)
            before = str(prompt or "")
            reference = f"{{{name}.{part}}}" if part else f"{{{name}}}"
            space = "" if not before or before.endswith((" ", "(", "{")) else " "
            written["value"] = f"{before}{space}{reference}" if before.strip() else f"a photo of {reference}"

        return self._acted(session, act, prompt=written)

    @staticmethod
    def _name_for(session: Session, run: str, index: int) -> str:
        """What stands for a concept in the prompt: the letter that it has, or the next one."""
        for name, concept in session.names.items():
            if concept == (run, index):
                return name
        number = len(session.names)
        name = chr(ord("a") + number % 26) + (str(number // 26) if number >= 26 else "")
        session.names[name] = (run, index)
        return name

    def _clear(self, session: Session) -> dict[Any, Any]:
        def act() -> None:
            session.names = {}

        return self._acted(session, act, prompt={"value": ""})

    def _mix(self, session: Session, prompt: object, count: Any, seed: Any) -> dict[Any, Any]:
        def act() -> None:
            text = str(prompt or "")[:1000]
            used = dict.fromkeys(re.findall(r"\{\s*([A-Za-z]\w*)", text))
            concepts = {
                name: (self.studio.runs.find(session.names[name][0]), session.names[name][1])
                for name in used
                if name in session.names
            }
            if not concepts:
                raise InputError("there is no concept in the prompt: click on one above")
            if type(count) is not int or not 1 <= count <= MOST_PICTURES:
                raise InputError(f"1 to {MOST_PICTURES} pictures can be drawn at once")
            if type(seed) is not int or not 0 <= seed < 2**63:
                raise InputError("the seed is a whole number of at least 0")
            session.mix = self.studio.mix(text, concepts, count=count, seed=seed)
            session.asked = (text, count)

        return self._acted(session, act)

    # --- What is shown -----------------------------------------------------------------------------------------------

    def _look(self, run: Run) -> Seen:
        """A run, read again only where something has changed."""
        now = signature(run)
        kept = self._seen.get(run.name)
        if kept is None or kept[0] != now:
            seen = look(self.studio.runs, run)
            if kept is not None and seen.state == DAMAGED and self._is_worked_on(run.name):
                return kept[1]  # it was looked at while it was being written
            self._seen.pop(run.name, None)
            self._seen[run.name] = kept = (now, seen)
            while len(self._seen) > REMEMBERED:
                self._seen.pop(next(iter(self._seen)))
        return kept[1]

    def _is_worked_on(self, name: str) -> bool:
        job = self.studio.job
        return job is not None and not job.ended and job.kind in (FINDING, LEARNING) and job.name == name

    def _current(self, session: Session) -> Seen:
        if not session.run:
            return NOTHING
        try:
            return self._look(self.studio.runs.find(session.run))
        except InputError:  # it has not begun yet, or is gone
            return NOTHING

    def _picture(self, session: Session) -> Image.Image | None:
        return self._current(session).picture

    def _outlines(self, session: Session) -> list[Outline]:
        """The objects as they are to be, a list of one's own."""
        if session.outlines is not None:
            return list(session.outlines)
        return [Outline(one.word, one.mask) for one in self._current(session).things]

    def _thumbnail(self, run: Run) -> Image.Image | None:
        try:
            key = (run.name, (run.path / "image.png").lstat().st_mtime_ns)
        except OSError:
            return None
        if key not in self._thumbnails:
            picture = self.studio.runs.read_picture(run.path, "image.png")
            if picture is not None:
                picture.thumbnail((fragments.THUMBNAIL, fragments.THUMBNAIL))
            if len(self._thumbnails) > 4 * LISTED:
                self._thumbnails.clear()
            self._thumbnails[key] = picture
        return self._thumbnails[key]

    def _painter(self, session: Session) -> dict[str, Any] | None:
        outlines, picture = self._outlines(session), self._picture(session)
        if picture is None or session.chosen >= len(outlines):
            return None
        one = outlines[session.chosen]
        return {
            "object": session.chosen,
            "width": picture.width,
            "height": picture.height,
            "picture": fragments.picture_url(picture),
            "mask": to_lengths(one.mask),
            "colour": fragments.colour_of(session.chosen),
            "label": one.word or "the new object",
        }

    def _shown(self, session: Session, more: Mapping[str, Mapping[str, Any]] | None = None) -> dict[Any, Any]:
        """All that the page does not have yet.

        more: of components, what is set in any case.
        """
        parts = self.parts
        updates: dict[Any, Any] = {}
        now = self._state_of_page(session)
        for name, values in now.items():
            if session.sent.get(name) != values:
                session.sent[name] = values
                updates[parts[name]] = gr.update(**values)
        updates |= {parts[name]: gr.update(**given) for name, given in (more or {}).items() if given}
        return updates or {parts["message"]: gr.skip()}

    def _state_of_page(self, session: Session) -> dict[str, dict[str, Any]]:
        job, runs = self.studio.job, self.studio.runs
        busy = job is not None and not job.ended
        seen = self._current(session)
        working = self._is_worked_on(session.run)
        everyone = runs.all()
        listed = [
            (run.name, "in work" if self._is_worked_on(run.name) else "complete" if run.complete else "unfinished",
             self._thumbnail(run))
            for run in everyone[:LISTED]
        ]  # fmt: skip
        problem = session.problem
        if not problem and job is not None and job.ended and job.problem and job.name in (session.run, session.mix):
            problem = job.problem
        problem = problem or seen.problem
        warned = job.warnings if job is not None and job.name in (session.run, session.mix) else []
        message = fragments.message(problem) or fragments.message(session.note, "note")
        message += "".join(fragments.message(f"Warning: {one}", "note") for one in warned)
        now: dict[str, dict[str, Any]] = {
            "runs": {"value": fragments.run_list(listed, session.run, max(0, len(everyone) - LISTED))},
            "message": {"value": message, "visible": bool(message)},
            "progress": {"value": fragments.progress(job), "visible": busy},
            "stop": {"visible": busy, "interactive": busy and job is not None and not job.stopping},
        }
        now |= self._find_state(session, seen, busy, working)
        now |= self._learn_state(session, seen, busy, working)
        now |= self._mix_state(session, everyone, busy)
        return now

    def _find_state(self, session: Session, seen: Seen, busy: bool, working: bool) -> dict[str, dict[str, Any]]:
        outlines = self._outlines(session)
        shown = [(number, one.word or "new object", one.mask) for number, one in enumerate(outlines)]
        open_to_change = seen.state in (FOUND, BEGUN, COMPLETE) and not working and seen.picture is not None
        picture = ""
        if session.dropped is not None:
            picture = fragments.with_outlines(session.dropped[0], [])
        elif seen.picture is not None:
            picture = fragments.with_outlines(seen.picture, shown, session.chosen if open_to_change else None)
        scores: list[float | None] = [one.score for one in seen.things]
        rows = [(number, word, scores[number] if session.outlines is None else None) for number, word, _ in shown]
        can_learn = seen.state != DAMAGED and (seen.state != COMPLETE or session.outlines is not None)
        next_step = NEXT[seen.state]
        if seen.state == LOOKING and session.outlines is not None:
            next_step = NEXT[FOUND]
        now: dict[str, dict[str, Any]] = {
            "picture": {"value": picture},
            "legend": {"value": fragments.legend(rows) if seen.picture is not None and session.dropped is None else ""},
            "find": {"interactive": session.dropped is not None and not busy},
            "learn": {
                "visible": seen.picture is not None and not working and session.dropped is None,
                "interactive": can_learn and not busy,
                "value": next_step,
            },
            "go_on": {
                "visible": seen.picture is not None and can_learn and not working,
                "interactive": not busy,
                "value": next_step,
            },
            "correct": {"visible": open_to_change},
        }
        if open_to_change:
            names = [f"{number}: {word}" for number, word, _ in shown]
            chosen = min(session.chosen, len(outlines) - 1)
            session.chosen = max(0, chosen)
            now["object"] = {"choices": names, "value": names[chosen] if names else None}
            now["word"] = {"value": (outlines[chosen].word or "") if names else ""}
            now["painter"] = {"value": self._painter(session)}
        return now

    def _learn_state(self, session: Session, seen: Seen, busy: bool, working: bool) -> dict[str, dict[str, Any]]:
        if not session.run or seen is NOTHING:
            head = '<p class="ik-quiet">Find objects first, or open a run.</p>'
        else:
            count = len(seen.steps)
            steps = f", {count} learning step{'s' * (count != 1)}" if count else ""
            state = "in work" if working else fragments.STATES[seen.state]
            head = f"<h3>{fragments.text(session.run)}: {state}{steps}</h3>"
        return {
            "learn_head": {"value": head},
            "curves": {"value": fragments.curves(seen.steps)},
            "concepts": {"value": fragments.concepts(seen)},
            "samples": {"value": fragments.samples(seen)},
        }

    def _mix_state(self, session: Session, everyone: list[Run], busy: bool) -> dict[str, dict[str, Any]]:
        complete = {run.name: run for run in everyone if run.complete}
        job = self.studio.job
        if job is not None and job.ended and job.kind == LEARNING and job.name == session.run:
            just = session.run
            if just in complete and just not in session.mixing and session.offered != just:
                session.mixing.append(just)
                session.offered = just
        session.mixing = [name for name in session.mixing if name in complete]
        shown = [(run, self._look(complete[run])) for run in session.mixing]
        chips = "".join(
            fragments.chips(run, seen.things, seen.picture) for run, seen in shown if seen.state == COMPLETE
        )
        nothing = '<p class="ik-quiet">No run is complete yet: find and learn the objects of a picture first.</p>'
        bound = "; ".join(
            f"<code>&#123;{name}&#125;</code> is {fragments.text(self._word_of(complete.get(run), index))} of "
            f"{fragments.text(run)}"
            for name, (run, index) in session.names.items()
        )
        hint = (
            "<code>&#123;a&#125;</code> is an object, <code>&#123;a.colour&#125;</code> its colour, "
            "<code>&#123;a - colour&#125;</code> the object without it, <code>&#123;a.colour:1.3&#125;</code> more of "
            "it."
        )
        pictures = []
        if session.mix and job is not None:
            folder = self.studio.runs.folder / MIXES / session.mix
            for number in range(session.asked[1]):
                names = (f"{number}.png", f".next/{number}.png")
                found = next((one for name in names if (one := self.studio.runs.read_picture(folder, name))), None)
                if found is not None:
                    pictures.append((f"{session.mix}-{number}.png", found))
        return {
            "mix_runs": {"choices": list(complete), "value": list(session.mixing)},
            "chips": {"value": chips if complete else nothing},
            "bound": {"value": f'<p class="ik-quiet">{bound + ". " if bound else ""}{hint}</p>'},
            "mix": {"interactive": not busy},
            "mixed": {"value": fragments.mixed(pictures, session.asked[0])},
        }

    def _word_of(self, run: Run | None, index: int) -> str:
        things: tuple[Thing, ...] = self._look(run).things if run is not None else ()
        return next((one.word for one in things if one.index == index), "what is gone")
