"""Settings of the package's components. Quick to import, unlike what they are settings of."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from icekit.backbones.settings import StableDiffusionSettings
from icekit.paths import stored_place
from icekit.protocols import CHANGES_NO_RESULT, ComponentSettings, Demo
from icekit.protocols.strict import Stored, needs_memory

Split = Literal["train", "held-out", "any"]

OWN_MODEL = "icekit-tabletop"
"""Name of the model that comes with the package, in ``Tabletop.Settings.model``."""


def _stored_model(model: str) -> str:
    return stored_place(model, names=(OWN_MODEL,))


class TabletopSettings(StableDiffusionSettings):
    """As Stable Diffusion's, with the package's own model as the default."""

    pipelines: ClassVar[tuple[str, ...]] = ()
    demo: ClassVar[Demo] = Demo(
        "package:icekit_tabletop/demo.png",
        {"load": 4, "localise": 2, "learn": 16, "generate": 37},
        "one core of a server",
    )

    model: Annotated[str, Stored(_stored_model)] = Field(
        default=OWN_MODEL,
        description=f"{OWN_MODEL}: the model that comes with the package; else a folder in diffusers' format",
    )
    words_only: bool = Field(
        default=True,
        description="let the noise predictor attend to the start token and the words alone, as it was trained",
    )
    images_at_once: int = Field(
        default=8,
        gt=0,
        description="images generated as one batch; the last bits of an image depend on how many are generated "
        "beside it",
        json_schema_extra=CHANGES_NO_RESULT | needs_memory(1),
    )


class DatasetSettings(ComponentSettings):
    """Which scenes."""

    split: Split = Field("held-out", description="combinations of shape, colour and material: held-out, train, any")
    objects: int | None = Field(None, ge=1, le=4, description="objects a scene; by default 1, 2 and 3 in turn")


class MetricSettings(ComponentSettings):
    """There are none."""
