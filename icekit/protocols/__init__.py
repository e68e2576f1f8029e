"""What a backbone, retriever, segmentor, learner and attribute must offer, and the values that pass between them.

Conventions, everywhere in icekit:

- an image is float32 ``[3, H, W]`` with values in [0, 1], square, its side ``backbone.image_size`` pixels;
- a mask is bool ``[H, W]``, the size of its image;
- latents are ``[B, C, h, w]``, already multiplied by the autoencoder's scaling factor;
- timesteps are int64 ``[B]`` in [0, ``backbone.num_timesteps``);
- every random choice comes from a ``torch.Generator`` on the CPU or a seed that the caller hands in.

A component is a class with a nested pydantic model ``Settings``. A backbone is built as ``Backbone(settings, device)``,
every other component as ``Component(settings, backbone)``.
"""

from icekit.protocols.backbone import AttentionMaps, Backbone, Conditioning, PosteriorBackbone
from icekit.protocols.components import (
    Checkpoint,
    ComponentSettings,
    Describer,
    Learner,
    Proposer,
    Retriever,
    Segmentor,
)
from icekit.protocols.errors import InputError, RunError
from icekit.protocols.measuring import (
    BenchImage,
    BenchPicture,
    Column,
    Dataset,
    FoundConcept,
    Match,
    Metric,
    Outcome,
    Score,
    TrueConcept,
)
from icekit.protocols.values import (
    ALL_PARTS,
    ATTRIBUTES,
    Attribute,
    Candidate,
    Learned,
    Proposal,
    Region,
    Segmentation,
    Step,
    View,
    object_tokens,
    parts_of,
    token_names,
)

__all__ = [
    "ALL_PARTS",
    "ATTRIBUTES",
    "AttentionMaps",
    "Attribute",
    "Backbone",
    "BenchImage",
    "BenchPicture",
    "Candidate",
    "Checkpoint",
    "Column",
    "ComponentSettings",
    "Conditioning",
    "Dataset",
    "Describer",
    "FoundConcept",
    "InputError",
    "Learned",
    "Learner",
    "Match",
    "Metric",
    "Outcome",
    "PosteriorBackbone",
    "Proposal",
    "Proposer",
    "Region",
    "Retriever",
    "RunError",
    "Score",
    "Segmentation",
    "Segmentor",
    "Step",
    "TrueConcept",
    "View",
    "object_tokens",
    "parts_of",
    "token_names",
]
