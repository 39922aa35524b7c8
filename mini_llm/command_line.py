"""The parsers of the project's commands: a wrong command line is answered in one sentence."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn


class UsageError(Exception):
    """What was asked for cannot be done; the message is one sentence with the flag and the fix."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of a flag that has one; of the others argparse would say "None"."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without the list of all flags before an error, and with the flag that was meant.

    Flags are spelt out: an abbreviation would change its meaning with the next flag that is added.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one sentence on stderr."""
        print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2)

    def parse_args(  # type: ignore[override] # argparse has three overloads for the same
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse does; an unknown flag is named with the nearest known one."""
        namespace, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = get_close_matches(name, self._flags(namespace), n=1)
            meant = f"; the nearest is {near[0]}" if near else ""
            self.error(f"unknown argument {name}{meant} (see --help)")
        return namespace

    def _flags(self, namespace: argparse.Namespace) -> list[str]:
        """Those of this command line, with those of its subcommand."""
        flags = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                chosen = action.choices.get(getattr(namespace, action.dest, ""))
                flags += chosen._option_string_actions if chosen else []
        return flags


class RaisingParser(Parser):
    """Raises UsageError, for a command that answers it together with its own."""

    def error(self, message: str) -> NoReturn:
        """Raise the sentence."""
        raise UsageError(message)
