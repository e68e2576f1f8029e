"""What a retriever, a segmentor and a learner must offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from icekit.protocols.strict import StrictSettings
from icekit.protocols.values import Attribute, Candidate, Learned, Proposal, Region, Segmentation, Step, View

if TYPE_CHECKING:  # torch takes seconds to import; a plugin module that only declares things does not need it
    import torch
    from torch import Tensor


class ComponentSettings(StrictSettings):
    """Base of every component's ``Settings``: unknown keys are refused, a ``Field(description=...)`` is its help.

    They are strict, see ``strict.StrictSettings``. One that changes no result, and so may change when a run goes on,
    says so: ``Field(..., json_schema_extra=CHANGES_NO_RESULT)``.
    """


class Retriever(Protocol):
    """Image -> words (ICE's T).

    What it, a segmentor and a learner are handed stays as it was, and so does the backbone. Pictures need not be
    square, a single pixel may be all that is visible, and one colour may be everywhere.

    A retriever whose words do not come from the view, but from the user, say, has a class attribute ``sees = False``: a
    word that it gives again says nothing of whether there is another of its kind.
    """

    def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
        """Words for what is still visible, best first, none of them equal or too similar to a word in ``used``.

        Each word once, and equal whatever its case; scores are finite, and the best is the highest. The same view and
        ``used`` have the same words. An empty list says that nothing nameable is left: the erase loop stops.
        """
        ...


@runtime_checkable
class Describer(Protocol):
    """A retriever that can also say which words of an attribute fit: learners may start from them."""

    def describe(self, view: View, noun: str, words: Sequence[str]) -> Mapping[str, float]:
        """How likely each word is to be true of what is visible, a ``noun``: from 0 to 1, and they sum to one.

        Words that the backbone does not know are left out; empty when it knows none.
        """
        ...


class TextEncoder(Protocol):
    """Texts as points of the space in which an ``Embedder`` places what it sees.

    space: as the ``Embedder``'s.
    """

    @property
    def space(self) -> str: ...

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Texts -> float32 ``[N, D]`` on the CPU, each row of length one; the same each time."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """A retriever that places pictures and texts in one space, as CLIP does: a run keeps a vector of each concept, and
    ``icekit find`` compares them with words and with one another.

    space: what tells this space from all others, a line of at most 200 characters: vectors of two models are never
    compared, and those of one are, wherever its files are.
    """

    @property
    def space(self) -> str: ...

    def embed(self, view: View) -> Tensor:
        """What is visible -> float32 ``[D]`` on the CPU, of length one; the same each time.

        It is asked about regions that ``retrieve`` and ``describe`` were asked about: what was computed then is
        computed once.
        """
        ...

    @staticmethod
    def text_encoder(settings: Any, device: torch.device) -> TextEncoder:
        """What embeds texts in the same space, without a backbone, and of what is on this machine: nothing is fetched.

        Args:
            settings: the retriever's ``Settings``.
            device: where it runs.

        Raises:
            InputError: its model is not on this machine.
            RunError: it cannot be loaded.
        """
        ...


class Segmentor(Protocol):
    """Image, word -> mask (ICE's S). A segmentor offers ``segment``, or else it is a ``Proposer``.

    A segmentor that knows something of the user's picture, as it was before it was fitted to the model's shape, may
    have a static method ``check_picture(settings, picture, size)``: the file's name and its (width, height), pixels,
    upright. It is called before the model is loaded, and raises InputError when its files are not of this picture.
    """

    def segment(self, view: View, word: str, generator: torch.Generator) -> Tensor | Segmentation:
        """The word's mask, bool ``[H, W]`` on the CPU, within ``view.visible``. All False: the word is not there.

        A mask alone is erased when it becomes a region; a ``Segmentation`` says for itself what is to be erased. The
        tensors are new ones, the caller's own. The same view, word and state of ``generator``, from which all random
        numbers come, give the same mask.
        """
        ...


@runtime_checkable
class Proposer(Protocol):
    """A segmentor that knows its masks without a word: the user's own files, or a clustering of the whole image.

    Its masks are all the regions there are: there is no erase loop. Where a mask has no word, the retriever names it,
    looking at that mask alone.
    """

    def propose(self, image: Tensor) -> list[Proposal]:
        """The regions of the image ``[3, H, W]``, in the order in which they are to be numbered: bool ``[H, W]`` on the
        CPU, none of them empty, the same each time, the caller's own tensors.
        """
        ...


class Checkpoint(Protocol):
    """Where a learner keeps its state, so that a killed run can go on. Saving is atomic."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the JSON-able state of the last save, or None."""
        ...

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the last save by this one."""
        ...


class Learner(Protocol):
    """Image, regions, attributes -> tokens.

    A learner has a token for a concept's category, its instance and every attribute. One that learns less says so in a
    class attribute ``parts``, a selection of ``ALL_PARTS`` with ``"instance"``, ``"category"`` or both in it: a method
    of one token a concept has ``parts = ("instance",)``. What is not there has no name, no samples and no measured
    value; no row is made up for it.

    A learner that works on backbones of its own says so in its settings, ``backbones: ClassVar[Mapping[str, str]]``:
    name of a backbone that a model may be read as -> of the one that is to take the model in its place.
    """

    def learn(
        self,
        image: Tensor,
        regions: Sequence[Region],
        attributes: Sequence[Attribute],
        *,
        seed: int,
        checkpoint: Checkpoint,
        on_step: Callable[[Step], None],
    ) -> Learned:
        """Learn the tokens of all regions: those of its ``parts``, and no others.

        The same seed gives the same tokens, another seed others where anything is drawn. Resumes from ``checkpoint``
        when it holds a state, and then ends with the same tokens, bit for bit on the same machine, as a run that was
        never interrupted. Calls ``on_step`` after every step, from 1 to a total that stays the same; what ``on_step``
        raises goes through, and the backbone is then as it was.

        There may be no attributes, and regions without hints.

        Raises:
            InputError: more concepts or attributes than it can learn together, an empty mask, regions without hints
                that it needs: one line, before the first step.
            RunError: a loss became NaN or infinite.
        """
        ...
