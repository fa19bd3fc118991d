"""What commands of this folder share: lines that begin with their name, exit code 2 for bad input, whole numbers of flags."""

import math
import sys


class Command:
    def __init__(self, name):
        self.name = name

    def say(self, text):
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def fail(self, text):
        self.say(text)
        raise SystemExit(2)

    def whole(self, flag, text, least, most=math.inf):
        return int(text) if text.isdigit() and least <= int(text) <= most else self.fail(
            f"{flag}: a whole number from {least}{f' to {most}' if most < 10**9 else ''}, not '{text}'")
