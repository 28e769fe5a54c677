"""The one exception that stands for a mistake of the user."""


class UserError(Exception):
    """A mistake the user can mend. The message is one line: what was found, what was expected, what to do."""
