"""What a user can cause and mend, told in one line."""

import argparse
from typing import NoReturn


class UserError(ValueError):
    """Bad input. The message is one line: it names the thing that is wrong and the remedy."""


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"{self.prog}: {message}; see --help\n")
