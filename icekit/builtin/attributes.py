"""The intrinsic attributes that ICE learns by default.

The anchor is the plain word rather than the article's "a colour concept": the intrinsic triplet holds the anchor's text
embedding against that of a bare token, and two texts of one form differ in meaning alone.
"""

from __future__ import annotations

from icekit.protocols import Attribute

COLOUR = Attribute(
    "colour",
    anchor="colour",
    vocabulary=(
        "red",
        "orange",
        "yellow",
        "green",
        "blue",
        "purple",
        "pink",
        "brown",
        "black",
        "white",
        "grey",
        "beige",
        "gold",
        "silver",
        "turquoise",
        "teal",
        "navy",
        "maroon",
        "magenta",
        "olive",
        "lavender",
        "cream",
    ),
    aliases=("color",),
)

MATERIAL = Attribute(
    "material",
    anchor="material",
    vocabulary=(
        "metal",
        "rubber",
        "glass",
        "wood",
        "stone",
        "plastic",
        "ceramic",
        "porcelain",
        "clay",
        "bronze",
        "copper",
        "steel",
        "iron",
        "concrete",
        "brick",
        "marble",
        "crystal",
        "ice",
        "wax",
        "paper",
        "cardboard",
        "leather",
        "fabric",
        "wool",
        "cotton",
        "silk",
        "velvet",
        "felt",
        "fur",
        "feather",
        "straw",
        "wicker",
        "bamboo",
        "foam",
    ),
)
