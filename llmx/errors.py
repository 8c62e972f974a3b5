"""The exception for bad input. A user of the command line sees its message alone."""

import argparse
from typing import NoReturn


class UserError(ValueError):
    """The user's input is wrong. The message names the key or file, and what to do."""


def one_line(error: object, most: int | None = None) -> str:
    """The text of an error of a library on one line, cut to `most` characters."""
    return " ".join(str(error).split())[:most]


class ArgumentParser(argparse.ArgumentParser):
    """Reports errors as UserErrors that begin with the verb, the last word of `prog`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.split()[-1]}: {message}")
