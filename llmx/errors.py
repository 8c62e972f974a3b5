"""The one exception that stands for bad input: its message is all that a user of the command line sees."""


class UserError(ValueError):
    """Something the user gave cannot be used. The message names the key or file, and what to do."""
