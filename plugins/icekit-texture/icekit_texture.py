"""Texture as an intrinsic attribute."""

from icekit import Attribute, hookimpl

WORDS = (
    "plain striped dotted checkered floral spotted speckled marbled plaid herringbone paisley zigzag"
    " smooth rough bumpy ribbed woven knitted fluffy furry cracked wrinkled grooved scaly"
)


@hookimpl
def register_attributes(register):
    register(Attribute("texture", anchor="texture", vocabulary=tuple(WORDS.split())))
