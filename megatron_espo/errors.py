"""The error that a user can mend."""


class UserError(ValueError):
    """A mistake in flags, files or the machine: one sentence that says what to change.

    Entry points and tools print it without a traceback and end with status 2. Every other
    exception is a fault of the program and keeps its traceback.
    """
