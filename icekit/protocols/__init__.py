"""What a backbone, retriever, segmentor, learner and attribute must offer, and the values that pass between them.

Conventions, everywhere in icekit:

- an image is float32 ``[3, H, W]`` with values in [0, 1], (H, W) = ``backbone.image_size``;
- a mask is bool ``[H, W]``, the size of its image;
- latents are ``[B, C, h, w]``, scaled as the noise predictor takes them; grids are (height, width);
- how noisy something is, is a share of the noise schedule, in [0, 1];
- every random choice comes from a ``torch.Generator`` on the CPU or a seed that the caller hands in.

A component is a class with a nested pydantic model ``Settings``. A backbone is built as ``Backbone(settings, device)``,
every other component as ``Component(settings, backbone)``.
"""

from icekit.protocols.backbone import (
    NO_TOKENS,
    Attention,
    Backbone,
    Capability,
    Conditioning,
    FineTuning,
    Grid,
    Look,
    PosteriorBackbone,
    Prediction,
    Token,
    Tokens,
    Trained,
    Tuned,
    nearest_grids,
)
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
from icekit.protocols.strict import CHANGES_NO_RESULT
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
    "CHANGES_NO_RESULT",
    "NO_TOKENS",
    "Attention",
    "Attribute",
    "Backbone",
    "BenchImage",
    "BenchPicture",
    "Candidate",
    "Capability",
    "Checkpoint",
    "Column",
    "ComponentSettings",
    "Conditioning",
    "Dataset",
    "Describer",
    "FineTuning",
    "FoundConcept",
    "Grid",
    "InputError",
    "Learned",
    "Learner",
    "Look",
    "Match",
    "Metric",
    "Outcome",
    "PosteriorBackbone",
    "Prediction",
    "Proposal",
    "Proposer",
    "Region",
    "Retriever",
    "RunError",
    "Score",
    "Segmentation",
    "Segmentor",
    "Step",
    "Token",
    "Tokens",
    "Trained",
    "TrueConcept",
    "Tuned",
    "View",
    "nearest_grids",
    "object_tokens",
    "parts_of",
    "token_names",
]
