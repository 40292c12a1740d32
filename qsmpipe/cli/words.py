"""Words of a command line, in any order, to options and what stands without one."""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from typing import Any, NoReturn

from qsmpipe.cli.errors import Exit, RunError

DASHES = "\N{EN DASH}\N{EM DASH}\N{MINUS SIGN}"
"""What word processors make of a hyphen."""

Place = tuple[int, str]
"""A word and where it stood."""


@dataclass
class _Given:
    """An option and the words behind it that may be its values."""

    action: argparse.Action
    option: str
    values: list[Place]


class Parser(argparse.ArgumentParser):
    """Options and other words in any order, and a hint for an option that is misspelt.

    ``argparse`` by itself lets an option of several values swallow the folders behind it, and
    takes ``-1e-3`` for an option.

    Parameters
    ----------
    last_words : sequence of str
        What the last word without an option may be, where that is known.
    choices
        As for :class:`argparse.ArgumentParser`.
    """

    def __init__(self, *, last_words: Sequence[str] = (), **choices: Any) -> None:
        super().__init__(allow_abbrev=False, **choices)
        self._last_words = last_words

    def error(self, message: str) -> NoReturn:
        """End with the exit code for wrong usage."""
        raise self._refusal(message)

    def _refusal(self, message: str) -> RunError:
        return RunError(Exit.USAGE, f"{message} ({self.prog} --help lists the options)")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Take all words, those without an option first.

        Raises
        ------
        RunError
            If a word belongs to nothing or something is lacking.
        """
        words = hyphenated(words)
        if {"-h", "--help", "--version"} & {*words}:
            return self.parse_args(words)
        given, others = self._told_apart(words)
        wanted = [action.dest for action in self._actions if not action.option_strings]
        if len(others) < len(wanted):
            others += self._swallowed(given, others, wanted)
        if len(others) > len(wanted):
            belongs = " ".join(word for _, word in others[: len(wanted)])
            raise self._refusal(
                f"{others[len(wanted)][1]!r} belongs to no option, and {', '.join(wanted)} are "
                f"given already: {belongs}"
            )
        # A folder whose name begins with a hyphen is not to be read as an option.
        folders = [f"./{word}" if word.startswith("-") else word for _, word in sorted(others)]
        options = [
            word for one in given for word in (one.option, *(value for _, value in one.values))
        ]
        return self.parse_args([*folders, *options])

    def _told_apart(self, words: Sequence[str]) -> tuple[list[_Given], list[Place]]:
        """Options with the words behind them that may be their values, and all other words."""
        given: list[_Given] = []
        others: list[Place] = []
        left = list(enumerate(words))
        while left:
            place, word = left.pop(0)
            if word == "--":
                return given, others + left
            if not _is_option(word):
                others.append((place, word))
                continue
            action = self._action(word)
            values: list[Place] = []
            if word in action.option_strings:  # no value hangs on it
                most = _most_values(action)
                while left and len(values) < most and not _is_option(left[0][1]):
                    if action.nargs == "?" and not _converts(action, left[0][1]):
                        break
                    at, value = left.pop(0)
                    values.append((at, self._number(word, value)))
            given.append(_Given(action, word, values))
        return given, others

    def _action(self, word: str) -> argparse.Action:
        """Find what an option does; one that does not exist ends with a hint."""
        known = {option: action for action in self._actions for option in action.option_strings}
        name = word.partition("=")[0]
        if name in known:
            return known[name]
        if not word.startswith("--") and word[:2] in known:
            return known[word[:2]]
        if word[0] in DASHES:
            raise self._refusal(
                f"{word!r} begins with a dash that is no hyphen: type it anew with hyphens (-)"
            )
        longer = [option for option in known if option.startswith(name)]
        close = longer[:3] or get_close_matches(name, known, n=1)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise self._refusal(f"there is no option {name}{hint}")

    def _number(self, option: str, word: str) -> str:
        """Write a negative number so that argparse takes it for one."""
        if not (word.startswith("-") and _is_number(word)):
            return word
        if not math.isfinite(float(word)):
            raise self._refusal(f"{option} {word}: give a finite number")
        # argparse knows no exponents; those that are too long for a float are not written out.
        return f"{Decimal(repr(float(word))):f}" if "e" in word.lower() else word

    def _swallowed(
        self, given: Sequence[_Given], others: Sequence[Place], wanted: Sequence[str]
    ) -> list[Place]:
        """Take the words that are lacking from the end of the one list that can hold them."""
        lacking = len(wanted) - len(others)
        lists = [one for one in given if one.action.nargs == "+" and one.values]
        holders = [
            one
            for one in lists
            if len(one.values) > lacking
            and (
                one.values[-1][1] in self._last_words
                or not any(_converts(one.action, word) for _, word in one.values[-lacking:])
            )
        ]
        if len(holders) == 1:
            values = holders[0].values
            taken, values[-lacking:] = values[-lacking:], []
            return taken
        if lists:
            names = " and ".join(dict.fromkeys(one.option for one in lists))
            these = ", ".join(wanted)
            raise self._refusal(
                f"of {these} {lacking} cannot be found: all words behind {names} are taken for "
                f"values; write {these} before the options, or behind --"
            )
        return []  # argparse says what is lacking


def _is_option(word: str) -> bool:
    """Whether a word begins like an option; a negative number does not."""
    if word[:1] in DASHES and word:
        return True
    return len(word) > 1 and word[0] == "-" and not _is_number(word)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _converts(action: argparse.Action, word: str) -> bool:
    try:
        if callable(action.type):
            action.type(word)
    except (ValueError, argparse.ArgumentTypeError):
        return False
    return True


def _most_values(action: argparse.Action) -> float:
    if isinstance(action.nargs, int):
        return action.nargs
    return math.inf if action.nargs == "+" else 1


def hyphenated(words: Sequence[str]) -> list[str]:
    """Let options be written with underscores, too.

    >>> hyphenated(["--work_dir", "my_work", "--run_label=a_b"])
    ['--work-dir', 'my_work', '--run-label=a_b']
    """
    return [re.sub(r"^--[^=]+", lambda m: m[0].replace("_", "-"), word) for word in words]
