"""Model files before a library reads them: JSON and safetensors alone, nothing that is run, whole and of this machine.

A model is somebody else's work. Its libraries can be told, by a line of JSON, to import Python files that lie beside
it or to unpickle weights. So every configuration is read here first, and weights are looked at, and a model of the hub
is fetched into the hub's cache before it is opened as the folder that it is.
"""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

from icekit.paths import resolved_path
from icekit.protocols import InputError, RunError
from icekit.protocols.errors import printable
from icekit.wording import is_typed

if TYPE_CHECKING:  # torch takes seconds to import, and whether there is a network is to be said before
    from torch import Tensor

CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "code_revision")
"""What makes a library run Python code that comes with a model."""
JSON_BYTES = 100_000_000
"""Longer JSON files are not read; the longest tokenizers have about 35 million."""
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
"""What the id of a hub model looks like."""
HUB_SECONDS = 3.0
"""How long the hub may take for its first answer: whoever has no network hears of it within five seconds."""
INDEX = "model_index.json"
"""What every model in diffusers' format has."""


def read_json(path: Path, named: str) -> dict[str, Any]:
    """A JSON object of a model, which asks for no code to be run.

    Args:
        path: the file.
        named: how messages begin: the setting and what it was given.

    Raises:
        InputError: it is missing, damaged, no JSON object, or it names code.
    """
    where = f"{named}: {path.parent.name}/{path.name}"
    if not path.is_file():
        raise InputError(f"{where}: there is no such file" if not path.exists() else f"{where}: it is no plain file")
    try:
        if path.stat().st_size > JSON_BYTES:
            raise InputError(f"{where} cannot be read: it is longer than {JSON_BYTES:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else one_line(error)
        raise InputError(f"{where} cannot be read: it should be a JSON object ({reason})") from error
    if not isinstance(content, dict):
        raise InputError(f"{where} cannot be read: it should be a JSON object, and is {_kind(content)}")
    if path.name not in ("tokenizer.json", "vocab.json", "added_tokens.json"):  # their keys are a vocabulary's words
        refuse_code(content, where)
    return content


def refuse_code(configuration: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration that asks for code to be run.

    where: the file that it is from, for messages.

    Raises:
        InputError: it does.
    """
    for key, value in _items(configuration):
        # A kernel of the hub, owner/name, is code as well.
        kernel = key.endswith("attn_implementation") and isinstance(value, str) and "/" in value
        if kernel or (key in CODE_KEYS and value):
            raise InputError(
                f"{where} asks for code to be run ({key}), which icekit never does: "
                "a model is JSON and safetensors files, of classes that its libraries have"
            )


def check_counts(configuration: Mapping[str, Any], tensors: int, where: str) -> None:
    """Refuse a configuration with more layers than the weights have tensors: building it might never end.

    Raises:
        InputError: it has.
    """
    for key, value in _items(configuration):
        numbers = value if isinstance(value, list) else [value]
        if "layers" in key and any(isinstance(one, int | float) and abs(one) > tensors for one in numbers):
            raise InputError(f"{where}: {key} is {value}, and the weights have {tensors} tensors: it is damaged")


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of nested JSON, the outermost first."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from one.items()
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return kinds.get(type(value), "a number")


def count_tensors(path: Path, named: str) -> int:
    """How many tensors a safetensors file has, by its header; refused unless the file is whole.

    Raises:
        InputError: it is missing, cut, empty or something else.
    """
    from safetensors import safe_open

    where = f"{named}: {path.parent.name}/{path.name}"
    if not path.is_file():
        raise InputError(f"{where}: there is no such file (it cannot be loaded from safetensors files without)")
    try:
        with safe_open(path, framework="pt") as weights:
            count = len(weights.keys())
    except Exception as error:  # safetensors' own, the file system's
        raise InputError(f"{where} is no whole safetensors file ({one_line(error)}): get it again") from error
    if not count:
        raise InputError(f"{where} has no weights in it: get it again")
    return count


def count_weights(folder: Path, stem: str, variant: str | None, named: str) -> int:
    """How many tensors the weights of one part of a model have, in a file or in several with an index.

    Args:
        folder: of the part.
        stem: what its library calls the file.
        variant: ``fp16`` or the like; the plain ones are read where the part has none of it.
        named: how messages begin.

    Raises:
        InputError: there are none as safetensors, or they are not whole.
    """
    for one in dict.fromkeys((variant, None)):
        ending = f".{one}" if one else ""
        file, index = folder / f"{stem}{ending}.safetensors", folder / f"{stem}.safetensors.index{ending}.json"
        if file.exists():
            return count_tensors(file, named)
        if index.exists():
            shards = read_json(index, named).get("weight_map")
            names = set(shards.values()) if isinstance(shards, dict) and _texts(shards.values()) else set()
            if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
                raise InputError(
                    f"{named}: {folder.name}/{index.name}: its weight_map should name .safetensors files beside it"
                )
            return sum(count_tensors(folder / name, named) for name in sorted(names))
    raise InputError(
        f"{named}: it cannot be loaded from safetensors files: there is no {folder.name}/{stem}.safetensors "
        "(pickled weights are not loaded)"
    )


def _texts(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def check_folder(folder: Path, named: str) -> None:
    """Read every JSON file that lies in a folder, see ``read_json``.

    Raises:
        InputError: one is damaged or names code; or it is an adapter's, for which a library loads another model.
    """
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{named}: it is an adapter of another model (adapter_config.json); take a whole one")
    for path in sorted(folder.glob("*.json")):
        read_json(path, named)


def from_safetensors(kind: Any, folder: Path, where: str, *, without: str = "", **options: Any) -> Any:
    """A model of transformers or diffusers from a folder that was checked before; nothing is run or fetched.

    Args:
        kind: its class.
        folder: in the library's format.
        where: how messages begin.
        without: weights whose names have this in them need not be there.
        options: of ``from_pretrained``.

    Raises:
        InputError: some of its weights are not in the files.
        Exception: what the library raises.
    """
    model, found = kind.from_pretrained(
        str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    missing = sorted(str(name) for name in found["missing_keys"] if not without or without not in str(name))
    if missing:
        names = f"{missing[0]}{', ...' if len(missing) > 1 else ''}"
        raise InputError(
            f"{where}: {len(missing)} weights of its {type(model).__name__} are not in its safetensors files "
            f"({names}): they are of another part or model"
        )
    return model


def check_vocabulary(size: int, rows: int, one: Sequence[int], other: Sequence[int]) -> None:
    """Refuse a tokenizer that is not the one that the rows of a text encoder were trained with.

    Tables are often a little longer than the vocabulary, for the sake of round numbers.

    Args:
        size: entries of the tokenizer.
        rows: of the table.
        one: ids of a word.
        other: ids of another word.

    Raises:
        InputError: the sizes are far from one another, ids have no row, or the two words have the same ids.
    """
    advice = "its tokenizer files are missing or another model's"
    if list(one) == list(other):
        raise InputError(f"its tokenizer takes different words for the same: {advice}")
    if abs(rows - size) > max(128, rows // 50) or max(*one, *other) >= rows:
        raise InputError(f"its tokenizer has {size:,} entries and its text encoder rows for {rows:,}: {advice}")


def check_finite(values: Tensor, part: str, advice: str) -> None:
    """Refuse NaN and infinity where they leave a part of a model.

    Args:
        values: float, of any shape.
        part: what they come from.
        advice: the way out.

    Raises:
        RunError: some are not finite.
    """
    if not bool(values.isfinite().all()):
        raise RunError(f"the {part} gives numbers that are NaN or infinite; {advice}")


def one_line(error: BaseException, length: int = 400) -> str:
    """What an error says, as one line of bounded length."""
    return printable(" ".join(str(error).split()) or type(error).__name__, length)


class Hub:
    """One model repository of the Hugging Face hub, whose files are read from its cache on this machine.

    The hub is asked once, with a deadline; where it does not answer, what the cache has is used.
    """

    def __init__(
        self,
        repository: str,
        filename: str | None,
        named: str,
        ways_out: str,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Ask for one file, or whether the repository is there.

        Args:
            repository: owner/name.
            filename: a file that every repository of this kind has; None where there is none such.
            named: how messages begin: what comes before "the Hugging Face hub does not give it".
            ways_out: what to do without the hub, for messages.
            revision: branch, tag or commit.
            local_files_only: use the cache alone.

        Raises:
            InputError: no such repository or file, or neither the hub nor the cache has it.
        """
        from huggingface_hub.constants import is_offline_mode

        self._repository, self._revision = repository, revision
        self._named, self._ways_out = named, ways_out
        self._no_answer = ""
        self.offline = local_files_only or is_offline_mode()
        """Whether the cache alone is used."""
        if not self.offline:
            self._ask(filename)
        if filename is not None:
            self.first = self.file(filename)
            """The file that was asked for, in the cache."""

    def file(self, name: str) -> Path:
        """One of its files, fetched where the cache has not got it.

        Raises:
            InputError: there is no such file, or it cannot be fetched.
        """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import LocalEntryNotFoundError

        def fetch() -> str:
            if not self.offline:
                return hf_hub_download(self._repository, name, revision=self._revision)
            # hf_hub_download asks the hub for something of its own even where it is to use the cache alone.
            found = try_to_load_from_cache(self._repository, name, revision=self._revision)
            if not isinstance(found, str):
                raise LocalEntryNotFoundError(f"the cache has not got {name}")
            return found

        return self._fetched(name, fetch)

    def folder(self, patterns: Sequence[str], without: Sequence[str] = ()) -> Path:
        """The folder of its files of these patterns, fetched where the cache has not got them.

        without: patterns of files that are left out.

        Raises:
            InputError: they cannot be fetched.
        """
        from huggingface_hub import snapshot_download

        return self._fetched(
            "its files",
            lambda: snapshot_download(
                self._repository,
                revision=self._revision,
                allow_patterns=list(patterns),
                ignore_patterns=list(without),
                local_files_only=self.offline,
            ),
        )

    def _fetched(self, what: str, fetch: Callable[[], str]) -> Path:
        try:
            return Path(fetch())
        except MemoryError:
            raise
        except Exception as error:  # the hub's, the network's, the file system's
            self._refuse(what, error)

    def _ask(self, filename: str | None) -> None:
        """One request, without the library's retries; name look-up and every address of the host are in the time."""
        from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

        answers: queue.Queue[BaseException | None] = queue.Queue(1)

        def ask() -> None:
            try:
                if filename is None:
                    HfApi().model_info(self._repository, revision=self._revision, timeout=HUB_SECONDS)
                else:
                    url = hf_hub_url(self._repository, filename, revision=self._revision)
                    get_hf_file_metadata(url, timeout=HUB_SECONDS, retry_on_errors=False)
                answers.put(None)
            except BaseException as error:  # handed to the thread that waits
                answers.put(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer = answers.get(timeout=HUB_SECONDS)
        except queue.Empty:
            answer = TimeoutError(f"no answer in {HUB_SECONDS:g} s")
        if isinstance(answer, HfHubHTTPError | EntryNotFoundError | HFValidationError):
            self._refuse(filename or "its files", answer)
        if answer is not None:
            self.offline, self._no_answer = True, f"no network: {one_line(answer)}"

    def _refuse(self, what: str, error: BaseException) -> Never:
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        if isinstance(error, LocalEntryNotFoundError):
            reason = f"{self._no_answer or 'offline'}, and the cache has not got {what}"
        elif isinstance(error, GatedRepoError):
            reason = "its owner wants to be asked first: accept its terms there and log in with `hf auth login`"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "it has no model of this name, or a private one"
        elif isinstance(error, RevisionNotFoundError):
            reason = f"the model has no revision {self._revision!r}"
        elif isinstance(error, EntryNotFoundError):
            reason = f"the model has no {what}"
        else:
            reason = one_line(error, 200)
        raise InputError(f"{self._named} the Hugging Face hub does not give it: {reason}; {self._ways_out}") from error


def ways_out() -> str:
    """What to do without the hub, for messages of a text-to-image model: another one, or a small one."""
    given = "with --model" if is_typed() else 'as in Settings(backbone={"model": FOLDER})'
    return (
        "give a folder in diffusers' format, a .safetensors file or the owner/name of a model that was downloaded "
        f"before (HF_HUB_OFFLINE=1 in the environment then uses the cache alone), {given}; or see icekit at work with "
        'a small model of its own: `pip install "icekit[demo]"`, then `icekit demo`'
    )


def check_within_reach(model: str, revision: str | None = None, local_files_only: bool = False) -> None:
    """Whether a text-to-image model is on this machine, or the hub gives it: quick, and before torch is imported.

    Args:
        model: a folder, a file or the id of a hub model. Of what is here nothing is read.
        revision: branch, tag or commit of a hub model.
        local_files_only: use the hub's cache alone.

    Raises:
        InputError: the hub's cache has not got it, and the hub does not give it.
    """
    from huggingface_hub import try_to_load_from_cache

    place = resolved_path(model, "backbone.model")
    if place.exists() or not (HUB_ID.fullmatch(model) and "/" in model):  # whoever loads it says what is wrong with it
        return
    if not isinstance(try_to_load_from_cache(model, INDEX, revision=revision), str):
        named = f"backbone.model = {model!r}: there is no such folder, and"
        Hub(model, INDEX, named, ways_out(), revision=revision, local_files_only=local_files_only)
