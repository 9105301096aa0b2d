"""The part of Protocol Buffers' encoding by which weights are written next to messages, without a copy of them."""

from __future__ import annotations


def varint(number: int) -> bytes:
    """Return a number of at least 0 in base 128, lowest digits first."""
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)
