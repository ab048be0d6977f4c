"""The one kind of error that a user can cause and mend."""


class UserError(ValueError):
    """Bad input. The message is one line: it names the thing that is wrong and the remedy."""
