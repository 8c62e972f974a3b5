"""The one exception that stands for bad input: its message is all that a user of the command line sees."""

import argparse
from typing import NoReturn


class UserError(ValueError):
    """Something the user gave cannot be used. The message names the key or file, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """One whose complaints are UserErrors that begin with the verb, the last word of `prog`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog.split()[-1]}: {message}")
