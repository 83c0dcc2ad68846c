"""The one error that is the user's to mend."""


class UserError(Exception):
    """Something in what the user gave: one sentence that says what is wrong, where, and what to do.

    The command line prints it without a traceback; every other exception is a bug and shows one.
    """
