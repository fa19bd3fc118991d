"""Files that are written whole or not at all."""

import os


def is_own_file(path):
    """Whether it may be replaced: it is not there, or a regular file that this program does not print to."""
    if not os.path.exists(path):
        return True
    there = os.stat(path)
    for stream in (1, 2):
        try:
            if os.path.samestat(there, os.fstat(stream)):
                return False
        except OSError:  # closed
            pass
    return os.path.isfile(path)


def write(path, text):
    """Text, or bytes. Beside, on to the disk, then renamed; a link's file is replaced, not the link. What is no file of its
    own, as /dev/null or a pipe, is handed the text. As benchmarks/results_file.cc does it."""
    kind = {"mode": "wb"} if isinstance(text, bytes) else {"mode": "w", "encoding": "utf-8"}
    if not is_own_file(path):
        with open(path, **kind | {"mode": kind["mode"].replace("w", "a")}) as file:
            file.write(text)
        return
    path = os.path.realpath(path)
    with open(path + ".part", **kind) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".part", path)
