"""The errors that are not bugs, and what may be shown of a stranger's words."""

from __future__ import annotations

import re
from collections.abc import Iterable

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


_CREDENTIALS = re.compile(r"(?<=://)[^/\s@:]*:[^\s@]*(?=@)")
_MOST_CHARACTERS = 4000


def printable(text: str) -> str:
    """A text as it may be shown: a stranger's names cannot steer a terminal in it (no escapes, no other direction of
    writing), and no address says the key and the secret that somebody has put into it."""
    return without_secrets(_UNPRINTABLE.sub(_escaped, text))


def without_secrets(text: str) -> str:
    """A text without what stands before the @ of an address, where that is a name and a secret."""
    return _CREDENTIALS.sub("…", text)


def one_line(text: str) -> str:
    """A stranger's words as a part of a line that is shown, cut where they are longer than anybody reads."""
    shown = printable(text)
    if any(letter in shown for letter in "\n\t"):
        shown = shown.replace("\n", "\\n").replace("\t", "\\t")
    return _cut(shown)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode()


def _cut(text: str) -> str:
    """The beginning and the end of a text that is too long; what to do stands at the end of our sentences."""
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} […] {text[-half:]}"


class UserError(Exception):
    """Something in what the user gave: one sentence that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 1, since the same will fail again; every other
    exception is a bug and shows one.
    """

    def __init__(self, sentence: str):
        super().__init__(_cut(printable(sentence)))


class PassingError(UserError):
    """Something that may be over when the same command is given again: a full disk, a lost cluster, a store that does
    not answer. The command line exits with 75 (EX_TEMPFAIL), so that a scheduler knows that another try is worth it."""


class TakenOverError(PassingError):
    """Another run has taken the output folder over."""


class DeviceError(PassingError):
    """A device that computes has failed, and the process that used it cannot go on."""


def listed(names: Iterable[str], count: int = 3) -> str:
    """The first few of some names, for a sentence."""
    found = list(names)
    return ", ".join(found[:count]) + (", …" if len(found) > count else "") or "none"


def plural(count: int, noun: str) -> str:
    """`1 shard`, `2 shards`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    """`12.3 s`, `4 min 05 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
