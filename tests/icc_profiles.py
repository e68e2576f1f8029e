"""Small ICC profiles (version 2), made for tests: three colours, grey, and four inks."""

from __future__ import annotations

import struct

XYZ = tuple[float, float, float]

WIDE: tuple[XYZ, XYZ, XYZ] = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
"""Display P3's primaries, adapted to D50."""


def profile(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile with these tags and a D50 white point."""
    tags = {b"wtpt": xyz(0.9642, 1.0, 0.8249)} | tags
    place, table, body = 132 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", place + len(body), b"\0\0\0\0", 0x02400000, kind, space, pcs)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header + b"\0" * (128 - len(header)) + struct.pack(">I", len(tags)) + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def wide_rgb() -> bytes:
    """Display P3's primaries with a gamma of 2.2."""
    colours = {name + b"XYZ": xyz(*primary) for name, primary in zip((b"r", b"g", b"b"), WIDE, strict=True)}
    return profile(b"mntr", b"RGB ", b"XYZ ", colours | {name + b"TRC": gamma(2.2) for name in (b"r", b"g", b"b")})


def linear_grey() -> bytes:
    """Grey as much light as its value says."""
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": gamma(1.0)})


def grey_cyan() -> bytes:
    """Four inks on white paper: cyan alone is a neutral grey of L* 50, all else black."""
    ramp = bytes(range(256))
    corners = [(255 if ink == 0 else 128 if ink == 8 else 0, 128, 128) for ink in range(16)]  # cyan varies slowest
    clut = b"".join(bytes(corner) for corner in corners)
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    table = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + matrix + ramp * 4 + clut + ramp * 3
    return profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})
