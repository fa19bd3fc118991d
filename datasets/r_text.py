"""Reads character vectors out of an R lazy-load database (a .rdx index beside a .rdb file).

The format is R's own: "R Internals", sections "Lazy loading" and "Serialization Formats". Only what such
an index and a vector of strings consist of is read; anything else is refused by its type number.
"""

import gzip
import struct
import zlib

NILVALUE, REF, SYMBOL, PAIRLIST, CHARACTERS, LOGICAL, INTEGER, STRINGS, LIST = (
    254, 255, 1, 2, 9, 10, 13, 16, 19)
HAS_ATTRIBUTES, HAS_TAG = 1 << 9, 1 << 10


class Unserializer:
    """One serialized R value (XDR, versions 2 and 3) as lists, strings and dicts of named items."""

    def __init__(self, data):
        if data[:2] != b"X\n":
            raise ValueError("not an XDR serialization")
        self.data, self.at, self.references = data, 2, []
        version, _, _ = self.integers(3)
        if version == 3:
            self.take(self.integers(1)[0])  # name of the native encoding
        elif version != 2:
            raise ValueError(f"serialization version {version}")

    def take(self, n):
        if n < 0 or self.at + n > len(self.data):
            raise ValueError("truncated serialization")
        self.at += n
        return self.data[self.at - n:self.at]

    def integers(self, n):
        return struct.unpack(f">{n}i", self.take(4 * n))

    def value(self):
        flags = self.integers(1)[0]
        kind = flags & 0xFF
        if kind == NILVALUE:
            return None
        if kind == REF:
            return self.references[(flags >> 8) - 1]
        if kind == SYMBOL:
            self.references.append(self.value())
            return self.references[-1]
        if kind == PAIRLIST:
            pairs = {}
            while kind == PAIRLIST:
                if flags & HAS_ATTRIBUTES:
                    self.value()
                tag = self.value() if flags & HAS_TAG else None
                pairs[tag] = self.value()
                flags = self.integers(1)[0]
                kind = flags & 0xFF
            if kind != NILVALUE:
                raise ValueError("a pair list without an end")
            return pairs
        if kind == CHARACTERS:
            n = self.integers(1)[0]
            return None if n == -1 else self.take(n).decode("utf-8")
        if kind in (LOGICAL, INTEGER):
            result = list(self.integers(self.integers(1)[0]))
        elif kind in (STRINGS, LIST):
            result = [self.value() for _ in range(self.integers(1)[0])]
        else:
            raise ValueError(f"R type {kind} is not read here")
        attributes = self.value() if flags & HAS_ATTRIBUTES else {}
        return dict(zip(attributes["names"], result)) if "names" in attributes else result


def read_strings(rdx, rdb, name):
    """The character vector `name`, as a list of strings."""
    with open(rdx, "rb") as file:
        index = Unserializer(gzip.decompress(file.read())).value()
    if name not in index["variables"]:
        raise ValueError(f"no variable {name}; there are {', '.join(index['variables'])}")
    offset, length = index["variables"][name]
    with open(rdb, "rb") as file:
        file.seek(offset)
        block = file.read(length)
    data = zlib.decompress(block[4:])
    if len(data) != struct.unpack(">I", block[:4])[0]:
        raise ValueError(f"variable {name} has another size than it says")
    strings = Unserializer(data).value()
    if not isinstance(strings, list) or not all(isinstance(s, str) for s in strings):
        raise ValueError(f"variable {name} is not a vector of strings")
    return strings
