"""The retriever of ICE's published implementation: a few words that together make up CLIP's embedding of the image.

SpLiCE (Bhalla et al., "Interpreting CLIP with Sparse Linear Concept Embeddings", NeurIPS 2024) writes the image's
embedding as a sparse, non-negative sum of the embeddings of a vocabulary's words: words that say the same share one
weight, and what one word explains no other one has to. ICE ranks all words with a weight anew by a second, larger CLIP.

CLIP's images and texts lie apart from one another, each around a mean of its own, so both are centred first. The words'
mean is that of the vocabulary. The images' mean is one over many images, and has to come from somewhere: see
``SpliceRetriever.Settings.image_mean``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from icekit.builtin.retrievers.clip import ClipRetriever, check_templates
from icekit.builtin.retrievers.settings import SpliceSettings
from icekit.clip import ClipModel
from icekit.files import is_hidden, read_bytes
from icekit.paths import setting_path
from icekit.pictures import MAX_BYTES, open_picture, to_rgb
from icekit.pixels import to_tensor
from icekit.protocols import Backbone, Candidate, InputError, View
from icekit.waiting import told

SAMPLE_PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "cat", "clock", "coffee", "coins", "grass", "gravel", "moon", "page", "rocket",
)  # fmt: skip
"""Pictures that scikit-image carries in its package (``skimage.data``): people, animals, things, surfaces, writing."""
IMAGE_BATCH = 64
"""Images of a folder that are embedded at once."""


class SpliceRetriever(ClipRetriever):
    """Words by their weight in a sparse decomposition of CLIP's image embedding.

    Raises:
        InputError: as ``ClipRetriever``, an image mean that is not there or does not fit the model, or a vocabulary of
            a single word, which has nothing to be set against.
        RunError: the weights cannot be fetched.
    """

    Settings = SpliceSettings

    settings: SpliceSettings

    def __init__(self, settings: SpliceSettings, backbone: Backbone) -> None:
        check_templates("rerank_templates", settings.rerank_templates)
        super().__init__(settings, backbone)
        if len(self._words) < 2:
            raise InputError(
                f"retriever.vocabulary: splice sets words against one another and needs two or more, but there is only"
                f" {self._words[0]!r}: add words, or choose --retriever clip"
            )
        self._concepts = centred(self._prompted, self._prompted[: len(self._words)].mean(dim=0))
        self._mean = image_mean(settings.image_mean, self._clip)
        if self._mean is not None and self._mean.shape != self._concepts.shape[1:]:
            raise InputError(
                f"retriever.image_mean: {settings.image_mean} holds {list(self._mean.shape)} numbers,"
                f" but {settings.model} embeds in {list(self._concepts.shape[1:])}"
            )
        self._second: ClipModel | None = None
        if settings.rerank:
            self._second = ClipModel(
                settings.rerank_model, settings.rerank_pretrained, backbone.device, prefix="rerank_"
            )

    def retrieve(self, view: View, used: Sequence[str]) -> list[Candidate]:
        """Words with a weight, heavier than any word for the background, heaviest first, at most ``top``.

        Words equal to one in ``used``, or as similar as ``max_similarity``, are not among them, nor are
        ``stop_words``. Scores are weights, above 0. With ``rerank`` they are the second CLIP's cosine similarities, in
        [-1, 1]: all words with a weight are ranked by them before the first ``top`` are taken.
        """
        return super().retrieve(view, used)

    def _ranked(self, view: View) -> list[Candidate]:
        embedding = self._embed_view(view, self._clip)
        image = embedding if self._mean is None else centred(embedding, self._mean)
        weights = sparse_weights(image, self._concepts, self.settings.l1_penalty)
        found = self._above_background(weights, floor=0.0)
        if self._second is None or not found:
            return found
        texts = self._second.embed_words([candidate.word for candidate in found], self.settings.rerank_templates)
        scores = (texts @ self._embed_view(view, self._second)).tolist()
        ranked = [Candidate(candidate.word, score) for candidate, score in zip(found, scores, strict=True)]
        return sorted(ranked, key=lambda candidate: -candidate.score)


def centred(embeddings: Tensor, mean: Tensor) -> Tensor:
    """(z - mean) / |z - mean|: embeddings ``[..., D]`` around a mean ``[D]``; zero stays zero."""
    return F.normalize(embeddings - mean, dim=-1)


def sparse_weights(image: Tensor, concepts: Tensor, penalty: float) -> list[float]:
    """The w >= 0 that minimises  |C^T w - z|^2 + lambda |w|_1  (SpLiCE, Bhalla et al., NeurIPS 2024).

    This is the form in which ICE's penalty is 0.2. Others count it differently: with 2 lambda |w|_1, or with a Lasso
    whose squared error is divided by the dimension D alone, the same weights belong to half the number.

    A concept without weight is not very similar to what is left, c . (z - C^T w) <= lambda / 2, and with a weight it
    is exactly so similar. So lambda / 2 is a cosine, and above the largest c . z all weights are 0.

    Args:
        image: z, ``[D]``, centred and L2-normalised.
        concepts: C, ``[N, D]``, each likewise.
        penalty: lambda > 0.

    Returns:
        N weights.
    """
    from sklearn.linear_model import Lasso

    # scikit-learn's objective is |C^T w - z|^2 / (2 D) + alpha |w|_1.
    solver = Lasso(alpha=penalty / (2 * len(image)), positive=True, fit_intercept=False, tol=1e-8, max_iter=100_000)
    solver.fit(concepts.double().numpy().T, image.double().numpy())
    return [float(weight) for weight in solver.coef_]


def image_mean(source: str, clip: ClipModel) -> Tensor | None:
    """The mean of CLIP's (normalised) image embeddings, float32 ``[D]``.

    Args:
        source: ``"photographs"``, ``"none"``, a ``.safetensors`` file with one tensor, or a folder of images.
        clip: embeds the images.

    Returns:
        None for ``"none"``.

    Raises:
        InputError: no such file or folder, or nothing usable in it.
    """
    if source == "none":
        return None
    if source == "photographs":
        from skimage import data

        pictures = [_square(Image.fromarray(getattr(data, name)())) for name in SAMPLE_PHOTOGRAPHS]
        return clip.embed_images(pictures).mean(dim=0)
    path = setting_path(source, "retriever.image_mean")
    if path.is_dir():
        there = (file for file in path.iterdir() if not is_hidden(file))
        files = sorted(file for file in there if file.suffix.lower() in Image.registered_extensions())
        if not files:
            raise InputError(f"retriever.image_mean: no image in the folder {source}")
        batches = [files[start : start + IMAGE_BATCH] for start in range(0, len(files), IMAGE_BATCH)]
        looked = told(batches, f"CLIP looks at the images of {source}, {IMAGE_BATCH} at once")
        return torch.cat([clip.embed_images([_read(file) for file in batch]) for batch in looked]).mean(dim=0)
    if not path.is_file():
        raise InputError(
            f"retriever.image_mean: no such file or folder: {source}; it can be photographs, none, a folder of images"
            " or a .safetensors file"
        )
    return _read_mean(source, path)


def _read_mean(source: str, path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = list(load_file(path).values())
    except (OSError, SafetensorError) as error:
        raise InputError(f"retriever.image_mean: {source} is not a .safetensors file") from error
    if len(tensors) != 1:
        raise InputError(f"retriever.image_mean: {source} holds {len(tensors)} tensors, expected the mean alone")
    return tensors[0].float().squeeze()


def _read(file: Path) -> Tensor:
    try:
        return _square(to_rgb(open_picture(read_bytes(file, MAX_BYTES), str(file)), str(file)))
    except (OSError, InputError) as error:
        raise InputError(f"retriever.image_mean: {file} cannot be read as an image") from error


def _square(image: Image.Image) -> Tensor:
    """The centre square, ``[3, S, S]`` in [0, 1]."""
    side = min(image.size)
    return to_tensor(ImageOps.fit(image.convert("RGB"), (side, side)))
