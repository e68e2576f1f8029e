"""Where the package keeps its trained model folders."""

from __future__ import annotations

from pathlib import Path

_MODELS = Path(__file__).resolve().parent / "models"


def _existing(name: str) -> Path:
    folder = _MODELS / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: `python -m icekit_tabletop.train` makes it")
    return folder


def model_dir() -> Path:
    """Folder of the text-to-image model. Raises ``FileNotFoundError`` when it has not been trained."""
    return _existing("stable-diffusion")


def clip_dir() -> Path:
    """Folder of the image-text model. Raises ``FileNotFoundError`` when it has not been trained."""
    return _existing("open-clip")
