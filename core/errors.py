"""The one exception that stands for a mistake of the user, and how those of other libraries are quoted in it."""


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what was found, what was expected, what to do."""


def first_line(error):
    """What an exception says, in one line of at most 150 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
