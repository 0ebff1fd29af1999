"""The one exception that a user, not a programmer, is meant to read."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one sentence that names the argument or file, says what came and what is wanted. The command line
    prints it after ``error:`` and exits with code 2, without a traceback.
    """
