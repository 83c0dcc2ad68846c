"""The errors that are not bugs."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """A text in which a stranger's names cannot steer a terminal: no escapes, no other direction of writing."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


class UserError(Exception):
    """Something in what the user gave: one sentence that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 1, since the same will fail again; every other
    exception is a bug and shows one.
    """

    def __init__(self, sentence: str):
        super().__init__(printable(sentence))


class PassingError(UserError):
    """Something that may be over when the same command is given again: a full disk, a lost cluster, a store that does
    not answer. The command line exits with 75 (EX_TEMPFAIL), so that a scheduler knows that another try is worth it."""


class DeviceError(PassingError):
    """A device that computes has failed, and the process that used it cannot go on."""
