"""Codes of 1, 2, 4 or 8 bits, packed into bytes; the first in the low bits."""

import numpy as np
from numpy.typing import NDArray


def packed_size(number: int, bits: int) -> int:
    """Bytes that `number` codes take: ⌈number · bits / 8⌉."""
    return -(-number * bits // 8)


def packed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes [n] below 2^bits, as bytes [⌈n·bits/8⌉]; the last one is filled up with zeros."""
    if bits == 8:
        return codes
    if bits == 1:
        return np.packbits(codes, bitorder="little")
    each = 8 // bits
    columns = np.zeros((packed_size(len(codes), bits), each), np.uint8)
    columns.reshape(-1)[: len(codes)] = codes
    result = columns[:, 0].copy()
    for place in range(1, each):
        result |= columns[:, place] << (place * bits)
    return result


def unpacked(content: NDArray[np.uint8], number: int, bits: int) -> NDArray[np.uint8]:
    """Inverse of `packed`, for `number` codes; `content` holds as many bytes as these take."""
    if bits == 8:
        return content
    if bits == 1:
        return np.unpackbits(content, count=number, bitorder="little")
    each = 8 // bits
    columns = np.empty((len(content), each), np.uint8)
    for place in range(each):
        columns[:, place] = (content >> (place * bits)) & (2**bits - 1)
    return columns.reshape(-1)[:number]
