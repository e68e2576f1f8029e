"""A run or a batch goes to the Hugging Face hub: the files that icekit wrote of it, and no others."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from icekit.batch.directory import PAGE, RECORD, BatchDirectory, thumbnail_name
from icekit.batch.directory import is_own_name as is_own_name_in_batch
from icekit.model_files import one_line
from icekit.paths import user_path
from icekit.protocols import InputError, RunError
from icekit.run.card import model_card
from icekit.run.directory import CARD, RunDirectory
from icekit.run.directory import is_own_name as is_own_name_in_run
from icekit.run.extraction import Extraction
from icekit.run.hub import PREFIX
from icekit.run.ownership import link_to

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
AT_ONCE = 5000
"""Files of one commit: more take the hub minutes."""
OF_A_BATCH = (RECORD, "pictures.jsonl", PAGE)
OF_THE_HUB = frozenset({".gitattributes"})
"""What a new repository has in it."""


@dataclass(frozen=True)
class Pushed:
    """What ``push`` did. url: the page of the repository. reference: ``hub:user/name``. files: how many went there."""

    url: str
    reference: str
    files: int


@dataclass(frozen=True)
class _Parcel:
    """What is to be pushed.

    names: of files, relative to the folder. more: further ones by name, made now. is_own: whether icekit writes such a
    name there.
    """

    folder: Path
    names: list[str]
    more: dict[str, str]
    is_own: Any


def push(run_dir: str | Path, repository: str, *, private: bool = False) -> Pushed:
    """Put a complete run, or a batch with all its complete runs, on the hub, into a repository that is made if need be.

    Only files in icekit's own record go there: no links, and nothing that somebody else put beside them. What an
    earlier push left there, and is not there any more, is deleted; other files of the repository stay. A repository
    that has files but no run or batch in it is refused.

    Args:
        run_dir: a run directory or a batch directory.
        repository: ``user/name``.
        private: whether a repository that is made now is private.

    Raises:
        InputError: no such run or batch, a wrong name, a repository of something else, or nobody is logged in.
        RunError: the hub cannot be reached, or refuses.
    """
    if not REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository!r}: no repository of the hub is named so: write user/name")
    folder = user_path(run_dir)
    parcel = _batch(folder) if (folder / RECORD).is_file() else _run(folder)
    from huggingface_hub import HfApi, is_offline_mode

    if is_offline_mode():
        raise InputError(f"{repository} cannot be pushed to: HF_HUB_OFFLINE is set, so that nothing reaches the hub")
    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        there = set(api.list_repo_files(repository)) - OF_THE_HUB
        if there and not there & {"manifest.json", RECORD}:
            raise InputError(f"{repository} has files in it, and no run or batch of icekit's: choose another name")
        _upload(api, repository, parcel, there)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # the hub's, the network's, the file system's
        raise _refused(repository, error) from error
    return Pushed(str(url), f"{PREFIX}{repository}", len(parcel.names) + len(parcel.more))


def _run(folder: Path) -> _Parcel:
    """What goes of a run. Raises InputError where it is not complete."""
    extraction = Extraction.open(folder)
    run = RunDirectory(extraction.run_dir)
    names = list(_of_run(run))
    more = {} if CARD in names else {CARD: model_card(run, extraction.record, extraction.settings())}
    return _Parcel(run.path, names, more, is_own_name_in_run)


def _of_run(run: RunDirectory) -> Iterator[str]:
    for name in sorted(run.own_names()):
        if _is_plain(run.path, name) and not name.startswith("checkpoint/"):
            yield name


def _batch(folder: Path) -> _Parcel:
    """What goes of a batch: its complete runs, and its page. Raises InputError where it is damaged or has none."""
    batch = BatchDirectory(folder)
    record = batch.record()
    names: list[str] = []
    runs = []
    for picture in record.pictures if record else []:
        if batch.has_run(picture.name):
            runs.append(picture.name)
            names += [f"runs/{picture.name}/{name}" for name in _of_run(batch.run(picture.name))]
            names += [name for name in (thumbnail_name(picture.name),) if _is_plain(folder, name)]
    if not runs:
        raise InputError(f"the batch in {folder} has no complete run: there is nothing to push")
    names += [name for name in OF_A_BATCH if _is_plain(folder, name)]
    return _Parcel(folder, names, {CARD: _card(folder.resolve().name, len(runs))}, _is_of_batch)


def _is_of_batch(name: str) -> bool:
    return is_own_name_in_batch(name) or name == CARD


def _card(name: str, runs: int) -> str:
    """The card of a batch; each of its runs has one of its own."""
    title = re.sub(r"[^\w .-]", " ", name).strip() or "a batch"
    return "\n".join([
        "---",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "tags:",
        "- textual_inversion",
        "- icekit",
        "---",
        "",
        f"# Concepts of {runs} pictures: {title}",
        "",
        "Each folder in `runs/` is a run of icekit with a card of its own: the concepts of one picture, with masks and "
        "with tokens for a text-to-image model. `index.html` shows all of them.",
        "",
        "```bash",
        'icekit find "red glass" hub:USER/NAME',
        'icekit compose "a photo of {a}" a=hub:USER/NAME/runs/PICTURE:0',
        "```",
        "",
    ])  # fmt: skip


def _is_plain(folder: Path, name: str) -> bool:
    """Whether this is a file that others may see: plain, in the folder, not hidden."""
    hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
    return not hidden and link_to(folder, name) is None and (folder / name).is_file()


def _upload(api: HfApi, repository: str, parcel: _Parcel, there: Iterable[str]) -> None:
    """Commit the files, the record that says what all are last; what an earlier push left goes with the first."""
    names = sorted(parcel.names, key=lambda name: (name in ("manifest.json", RECORD), name))
    leaving = [name for name in there if parcel.is_own(name) and name not in {*names, *parcel.more}]
    parts: list[Sequence[str]] = [names[start : start + AT_ONCE] for start in range(0, len(names), AT_ONCE)]
    for number, part in enumerate(parts, 1):
        more = parcel.more if number == len(parts) else {}
        with tempfile.TemporaryDirectory(prefix="icekit-push-") as staged:
            # What is uploaded is a folder, and so a folder is made that has these files in it and no others.
            for name in part:
                place = Path(staged, name)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(os.path.abspath(parcel.folder / name))
            for name, text in more.items():
                Path(staged, name).write_text(text, encoding="utf-8", errors="backslashreplace")
            api.upload_folder(
                repo_id=repository,
                folder_path=staged,
                commit_message="icekit push" + (f" ({number} of {len(parts)})" if len(parts) > 1 else ""),
                delete_patterns=[re.sub(r"([*?[])", r"[\1]", name) for name in leaving] if number == 1 else None,
            )


def _refused(repository: str, error: Exception) -> InputError | RunError:
    """Why the hub did not take it, in one line."""
    from huggingface_hub.errors import HfHubHTTPError

    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    status = getattr(response, "status_code", None)
    if status in (401, 403):
        return InputError(
            f"{repository} cannot be pushed to: log in with `hf auth login` as somebody who may write there"
        )
    if status is not None:
        return RunError(f"{repository} cannot be pushed to: the hub answers {status}: {one_line(error, 200)}")
    return RunError(f"{repository} cannot be pushed to: {one_line(error, 200)}; check the network and try again")
