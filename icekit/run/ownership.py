"""Whose files these are: what icekit wrote in a folder, who is writing there now, and how new files replace old ones.

icekit deletes and replaces what is in its own record and nothing else, and follows no symbolic link on its way. What is
to replace something is built in a subfolder and moved to its place when it is complete; a process that is killed at
any moment leaves the old files, the new ones, or a plan that the next one carries out.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from icekit.foreign import is_of_the_machine
from icekit.protocols import InputError
from icekit.run.atomic import CannotWrite, why, write_atomically, write_json_atomically, writing
from icekit.wording import named

LOCK = ".icekit.lock"
NEXT = ".next"
"""Subfolder in which is built what is to replace the rest of the folder."""
EXPORTS = ".icekit.exports.json"
"""The record of what exporters wrote into a folder, see ``exports``: it is deleted after all that is in it."""
EXPORTS_LOCK = ".icekit.exports.lock"
"""Held while an exporter's files come into a folder, which may be a run's while another run is made to replace it."""
PLAN = "exchange.json"
"""In ``NEXT``: what is moved and deleted. From when it is there the new files hold, whatever happens."""
PATIENCE_S = 0.5
"""Seconds until a lock is taken for held: others look at it for an instant."""
EXCHANGE_S = 10.0
"""Seconds to wait for a process that is moving files to their place."""


class Busy(InputError):
    """Another process is writing into the folder."""


# --- Who is writing ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing_into(folder: Path, name: str = LOCK, wait: float = PATIENCE_S) -> Iterator[None]:
    """Keep other processes from writing into a folder, which is made if need be and goes again if it stays empty.

    The system lets go of the lock when the process ends, however it ends.

    name: of the lock's file. wait: seconds.

    Raises:
        Busy: another process has the lock.
        InputError: the folder cannot be written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock, file = FileLock(folder / name), folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait)
        if _process_of(file) != os.getpid():
            file.write_text(f"{os.getpid()}\n")
    except Timeout as error:
        raise _busy(folder, file) from error
    except OSError as error:
        lock.release()
        _remove_empty(made)
        raise cannot_write(folder, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()
        _remove_empty(made)


def refuse_if_busy(folder: Path, name: str = LOCK) -> None:
    """Nothing, unless another process is writing into the folder.

    Raises:
        Busy: it is.
    """
    file = folder / name
    if not os.path.lexists(file):
        return
    lock = FileLock(file)
    try:
        lock.acquire(timeout=PATIENCE_S)
    except Timeout as error:
        raise _busy(folder, file) from error
    except OSError:
        return  # nobody can write here, or this process cannot: it will be told when it does
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)  # a killed process left it
    lock.release()


def cannot_write(folder: Path, error: OSError) -> InputError | CannotWrite:
    """What to say of a folder that cannot be written to: another one would do, or else the machine is at an end."""
    if is_of_the_machine(error) and error.errno != errno.EROFS:
        return CannotWrite(folder, error)
    return InputError(f"cannot write to {folder}: {why(error)}")


def _busy(folder: Path, file: Path) -> Busy:
    process = _process_of(file)
    who = f"another icekit (process {process})" if process else "another icekit"
    return Busy(f"{who} is writing into {folder}: wait for its end, or choose another {named('out')}")


def _process_of(file: Path) -> int | None:
    """The process that a lock's file names."""
    try:
        lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
        return int(lines[0]) if lines else None
    except (OSError, ValueError):
        return None


# --- What is icekit's -------------------------------------------------------------------------------------------------


class Written:
    """The record of what icekit wrote below a folder, kept in a file there: one name a line, before the file is.

    root: the folder. name: of the record's file in it. before: what is icekit's where there is no record yet.
    """

    def __init__(self, root: Path, name: str, before: Callable[[], Iterable[str]] = tuple) -> None:
        self.root, self.name = root, name
        self._before = before
        self._known: set[str] | None = None

    @property
    def is_there(self) -> bool:
        """Whether there is a record."""
        return (self.root / self.name).is_file()

    def names(self) -> set[str]:
        """What was written, relative to the folder, ``/`` between; a name that ends with it is a folder's."""
        if not self.is_there:
            return set(self._before())
        names = set()
        for line in (self.root / self.name).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # the line that was being written when the process was killed
                name = json.loads(line)
                if isinstance(name, str) and is_inside(name):
                    names.add(name)
        return names

    def claim(self, name: str) -> None:
        """Put a name into the record: call it before the file is written.

        Raises:
            InputError: somebody else's file has this name, or a symbolic link leads there.
        """
        refuse_links(self.root, name)
        if self._known is None:
            self._known = self.names()
            if not self.is_there:
                self._replace(self._known)
        if name in self._known:
            return
        if os.path.lexists(self.root / name):
            self._known = self.names()  # another process may have written it
            if name in self._known:
                return
            raise in_the_way(self.root / name)
        refuse_links(self.root, self.name)
        with writing(self.root / self.name), (self.root / self.name).open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            torn = size and file.read(1) != b"\n"
            file.write((b"\n" if torn else b"") + json.dumps(name).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._known.add(name)

    def reset(self, kept: Collection[str] = ()) -> None:
        """Begin a new record. kept: what is there still, and icekit's."""
        self._known = set(kept)
        self._replace(self._known)

    def _replace(self, names: Iterable[str]) -> None:
        refuse_links(self.root, self.name)
        write_atomically(self.root / self.name, "".join(json.dumps(name) + "\n" for name in sorted(names)).encode())


def is_inside(name: object) -> bool:
    """Whether this is a name relative to a folder that leads nowhere out of it."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path != PurePosixPath(".")


def refuse_links(root: Path, name: str) -> None:
    """Nothing, unless a folder on the way from ``root`` to ``name``, or that itself, is a symbolic link.

    Raises:
        InputError: names the link.
    """
    link = link_to(root, name)
    if link is not None:
        raise InputError(
            f"{link} is a symbolic link: icekit writes and deletes nothing behind one; put what it leads to in its "
            "place, or take it away"
        )


def link_to(root: Path, name: str) -> Path | None:
    """The first symbolic link on the way from ``root``, which may be one, to ``name``."""
    path = root
    for part in PurePosixPath(name).parts:
        path = path / part
        if path.is_symlink():
            return path
    return None


def in_the_way(path: Path) -> InputError:
    """What to say of somebody else's file where one of icekit's is to be."""
    return InputError(f"{path} is in the way: icekit did not write it, and replaces nothing of others; move it away")


def delete_files(root: Path, names: Iterable[str]) -> None:
    """Delete files, and the folders that are empty then. What is behind a symbolic link stays."""
    names = [name for name in names if is_inside(name) and link_to(root, name) is None]
    for name in sorted(names, key=lambda name: PurePosixPath(name).name == EXPORTS):
        if not (root / name).is_dir():
            (root / name).unlink(missing_ok=True)
    remove_empty_folders(root, names)


def remove_empty_folders(root: Path, names: Iterable[str]) -> None:
    """Remove the folders of these files as far as they are empty."""
    folders = {parent for name in names for parent in PurePosixPath(name).parents if parent != PurePosixPath(".")}
    _remove_empty(root / folder for folder in sorted(folders, key=lambda one: len(one.parts), reverse=True))


def delete_half_written(root: Path, names: Collection[str]) -> None:
    """Delete what a killed process had half-written of these files."""
    folders = {str(PurePosixPath(name).parent) for name in names}
    for folder in folders:
        if link_to(root, folder) is None and (root / folder).is_dir():
            for path in list((root / folder).iterdir()):
                final = becomes(path)
                if final and path.with_name(final).relative_to(root).as_posix() in names:
                    delete(path)


def becomes(path: Path) -> str | None:
    """The name of the file that a temporary one was to become; None if it is none. See ``atomic``."""
    match = re.fullmatch(r"\.(.+?)(\.\d+)?\.part", path.name)
    return match[1] if match else None


def delete(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a symbolic link and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


# --- The new in the place of the old ----------------------------------------------------------------------------------


def check_way(folder: Path, old: Collection[str], new: Iterable[str]) -> None:
    """Whether new files can be moved to their place in a folder.

    old: names of icekit's files there, which may be replaced. new: of those that are to come.

    Raises:
        InputError: one would replace somebody else's file, or a symbolic link leads there.
    """
    for name in sorted(new):
        refuse_links(folder, name)
        if os.path.lexists(folder / name) and (name not in old or (folder / name).is_dir()):
            raise in_the_way(folder / name)
        for parent in list(PurePosixPath(name).parents)[:-1]:
            if os.path.lexists(folder / parent) and not (folder / parent).is_dir():
                raise in_the_way(folder / parent)


def exchange(folder: Path, *, old: Collection[str], new: Collection[str], last: str) -> None:
    """Replace files of a folder by those that were built in its subfolder ``NEXT``.

    Args:
        folder: it.
        old: names of icekit's files in it; those that the new ones lack are deleted.
        new: names of files in ``NEXT``.
        last: the one of them whose presence says that all are there.

    Raises:
        InputError: see ``check_way``; nothing was changed then.
    """
    check_way(folder, old, new)
    for name in old:
        refuse_links(folder, name)
    delete_half_written(folder / NEXT, {PLAN})
    write_json_atomically(folder / NEXT / PLAN, {"old": sorted(old), "new": sorted(new), "last": last})
    with writing(folder / last):
        carry_out(folder)


def is_pending(folder: Path) -> bool:
    """Whether an exchange was begun here and not ended."""
    return link_to(folder, f"{NEXT}/{PLAN}") is None and (folder / NEXT / PLAN).is_file()


def finish_exchange(folder: Path, is_own: Callable[[str], bool], *, writing: bool = False) -> None:
    """End an exchange that another process has begun in this folder, if there is one.

    is_own: whether icekit writes files of such a name; a plan that says more is somebody else's.
    writing: whether this process is ``writing_into`` the folder already.

    Raises:
        Busy: that process is still at it.
        InputError: the plan is not icekit's, or cannot be carried out.
    """
    if not is_pending(folder):
        return
    with contextlib.nullcontext() if writing else writing_into(folder, wait=EXCHANGE_S):
        if not is_pending(folder):  # the other process ended it meanwhile
            return
        old, new, last = _read_plan(folder)
        if not all(is_own(name) for name in (*old, *new, last)):
            raise InputError(f"{folder / NEXT / PLAN} names files that icekit does not write: take it away")
        try:
            carry_out(folder)
        except OSError as error:
            raise cannot_write(folder, error) from error


def carry_out(folder: Path) -> None:
    """Do what the plan says, as far as it is not done yet.

    Raises:
        InputError: see ``check_way``; or the plan is damaged.
    """
    old, new, last = _read_plan(folder)
    source = folder / NEXT
    if (source / last).is_file():  # the last to be moved
        left = [name for name in new if os.path.lexists(source / name)]
        check_way(folder, {*old, last}, left)
        for name in left:
            refuse_links(source, name)
        (folder / last).unlink(missing_ok=True)
        delete_files(folder, {*old} - {*new})
        for name in left:
            if name != last:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(source / name, folder / name)
        os.replace(source / last, folder / last)
    remove_empty_folders(source, new)
    (source / PLAN).unlink(missing_ok=True)
    remove_next(folder)


def remove_next(folder: Path) -> None:
    """Remove the subfolder ``NEXT``, where there is one from which all was moved or deleted."""
    if link_to(folder, NEXT) is None and (folder / NEXT).is_dir():
        delete_half_written(folder / NEXT, {PLAN})
        for path, _, _ in os.walk(folder / NEXT, topdown=False):  # the files of somebody else keep their folders
            _remove_empty([Path(path)])


def _read_plan(folder: Path) -> tuple[list[str], list[str], str]:
    try:
        plan = json.loads((folder / NEXT / PLAN).read_text(encoding="utf-8"))
        old, new, last = plan["old"], plan["new"], plan["last"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        old, new, last = [None], [], ""
    if not (isinstance(old, list) and isinstance(new, list) and all(map(is_inside, (*old, *new))) and last in new):
        raise InputError(f"{folder / NEXT / PLAN} is damaged: icekit cannot end the exchange that it had begun there")
    return old, new, last
