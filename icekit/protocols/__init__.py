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
    ConceptBackbone,
    Conditioning,
    Demo,
    FineTuning,
    Grid,
    Look,
    MemoryNeed,
    PosteriorBackbone,
    Prediction,
    ShapedBackbone,
    Token,
    Tokens,
    Trained,
    Tuned,
    World,
    nearest_grids,
)
from icekit.protocols.components import (
    Checkpoint,
    ComponentSettings,
    Describer,
    Embedder,
    Learner,
    Proposer,
    Retriever,
    Segmentor,
    TextEncoder,
)
from icekit.protocols.errors import InputError, RunError, StopRun
from icekit.protocols.executing import Executor, ExecutorSettings, JobResult, Work
from icekit.protocols.exporting import Exporter
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
    is_instance,
    object_tokens,
    parts_of,
    token_names,
)

VERSION = 1
"""The version of these protocols and of the hooks.

It rises when a plugin that was right would go wrong: a method is called with other arguments, a value is asked for that
was not, a name that plugins import is gone. It stays when something is added that need not be used. A plugin's module
that says ``icekit_protocol = 1`` is refused, in one line, by an icekit of another version."""

__all__ = [
    "ALL_PARTS",
    "ATTRIBUTES",
    "CHANGES_NO_RESULT",
    "NO_TOKENS",
    "VERSION",
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
    "ConceptBackbone",
    "Conditioning",
    "Dataset",
    "Demo",
    "Describer",
    "Embedder",
    "Executor",
    "ExecutorSettings",
    "Exporter",
    "FineTuning",
    "FoundConcept",
    "Grid",
    "InputError",
    "JobResult",
    "Learned",
    "Learner",
    "Look",
    "Match",
    "MemoryNeed",
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
    "ShapedBackbone",
    "Step",
    "StopRun",
    "TextEncoder",
    "Token",
    "Tokens",
    "Trained",
    "TrueConcept",
    "Tuned",
    "View",
    "Work",
    "World",
    "is_instance",
    "nearest_grids",
    "object_tokens",
    "parts_of",
    "token_names",
]
