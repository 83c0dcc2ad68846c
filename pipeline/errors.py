"""The errors that are not bugs."""


class UserError(Exception):
    """Something in what the user gave: one sentence that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 1, since the same will fail again; every other
    exception is a bug and shows one.
    """


class PassingError(UserError):
    """Something that may be over when the same command is given again: a full disk, a lost cluster, a store that does
    not answer. The command line exits with 75 (EX_TEMPFAIL), so that a scheduler knows that another try is worth it."""


class DeviceError(PassingError):
    """A device that computes has failed, and the process that used it cannot go on."""
