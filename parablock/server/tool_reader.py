"""Tool calls, read while they arrive.

No library is used: engines' parsers are parts of their engines, and transformers' `ResponseParser` tells a call only
once it is whole, and raises where it is malformed.
"""

import json
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from parablock.server.tool_formats import Format

KEYS = ("name", "arguments", "parameters", "type", "id")  # of a call; others belong to some other JSON
FIRST_KEY = re.compile(r'\{\s*(?:"(\w*)("?))?')
ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*\{$')
OUTSIDE = frozenset(",:-+.0123456789eEtrufalsn \t\r\n")  # of JSON, outside of strings, besides brackets and quotes


class Said(NamedTuple):
    """More of the text beside calls."""

    text: str


class Begun(NamedTuple):
    """A call of this function begins."""

    name: str


class Arguments(NamedTuple):
    """More of the running call's arguments, as JSON."""

    text: str


class Ended(NamedTuple):
    """The running call is whole."""


Event = Said | Begun | Arguments | Ended


class _Json:
    """Where in a JSON value one is, character by character."""

    def __init__(self) -> None:
        self.depth = 0
        self._string = False
        self._escaped = False

    def read(self, char: str) -> bool:
        """Go on by a character; False: JSON has none such there."""
        if self._escaped:
            self._escaped = False
        elif char == '"':
            self._string = not self._string
        elif self._string:
            self._escaped = char == "\\"
        elif char in "{[":
            self.depth += 1
        elif char in "}]":
            self.depth -= 1
        else:
            return char in OUTSIDE
        return True


class Reader:
    """An answer's text as text and calls, wherever it is cut into pieces.

    A call is one as soon as its arguments begin, and it names one of the functions; everything else stays text,
    malformed calls, too. Arguments are told as they are written, so that they may be no JSON where nothing holds the
    model to it: then they go on to the call's end mark. White space beside calls is dropped.

    Args:
        one: nothing is read behind the first call.
    """

    def __init__(self, format: Format, names: Collection[str], *, one: bool = False) -> None:
        self.full = False  # what follows does not matter
        self.calls = 0  # so far
        self._format = format
        self._names = names
        self._one = one
        self._rest = ""  # not told yet
        self._last = False
        self._events: list[Event] = []
        self._state: Callable[[], bool] = self._text  # tells what it can; True: another one goes on
        self._bare = format.bare
        self._opening = 0  # characters of white space and mark before a call
        self._at = 0  # up to there the call is read
        self._json = _Json()
        self._late = False  # its arguments come before its name

    def push(self, text: str, *, last: bool = False) -> list[Event]:
        """What is new with this piece of the text; `last`: nothing more will come."""
        self._rest += text
        self._last, self._events = last, []
        while self._state():
            pass
        return self._events

    def _text(self) -> bool:
        """Up to the next mark."""
        rest = self._rest
        if self._bare:
            blank = len(rest) - len(rest.lstrip())
            if blank == len(rest) and not self._last:
                return False
            if rest[blank:].startswith("{"):
                return self._open(blank)
            if rest[blank:] and not self._format.mark.startswith(rest[blank:]):
                self._bare = False
        mark = rest.find(self._format.mark)
        if mark >= 0:
            said = len(rest[:mark].rstrip())
            self._say(said)
            return self._open(mark - said + len(self._format.mark))
        if self._last:
            self._say(len(rest.rstrip() if self.calls else rest))
        else:
            self._say(len(rest[: len(rest) - _overlap(rest, self._format.mark)].rstrip()))
        return False

    def _open(self, opening: int) -> bool:
        self._bare = False
        self._opening = opening
        self._at = 0
        self._json, self._late = _Json(), False
        self._state = self._head
        return True

    def _head(self) -> bool:
        """A call up to its arguments."""
        rest = self._rest
        start = _past(self._format.before, rest, self._opening)
        if start == len(rest):
            return self._last and self._no_call()
        if not self._may_begin(start):
            return self._no_call()
        self._at = max(self._at, start)
        while self._at < len(rest):
            if not self._json.read(rest[self._at]):
                return self._no_call()
            self._at += 1
            if self._json.depth == 0:
                return self._whole(rest[start : self._at])
            opens = self._json.depth == 2 and rest[self._at - 1] == "{" and not self._late
            if opens and ARGUMENTS.search(rest, max(start, self._at - 64), self._at):
                call = _parsed(rest[start : self._at] + "}}")
                if call and call.get("name") in self._names:
                    return self._begin(call["name"])
                self._late = True
        return self._last and self._no_call()

    def _may_begin(self, start: int) -> bool:
        """What stands there may be a call, as far as its first key says."""
        found = FIRST_KEY.match(self._rest, start)
        if not found:
            return False
        if found[1] is None or found[2]:
            return found.end() == len(self._rest) if found[1] is None else found[1] in KEYS
        return found.end() == len(self._rest) and any(key.startswith(found[1]) for key in KEYS)

    def _no_call(self) -> bool:
        self._say(self._opening)
        self._state = self._text
        return True

    def _begin(self, name: str) -> bool:
        self._events.append(Begun(name))
        self.calls += 1
        self._rest, self._at = self._rest[self._at - 1 :], 1
        self._state = self._arguments
        return True

    def _whole(self, text: str) -> bool:
        """A call that names its function behind its arguments, or has none."""
        call = _parsed(text)
        given = [call[key] for key in ("arguments", "parameters") if key in call] if call else []
        arguments = given[0] if given else {}
        if call is None or call.get("name") not in self._names or not isinstance(arguments, dict):
            return self._no_call()
        self.calls += 1
        self._events += [Begun(call["name"]), Arguments(json.dumps(arguments, ensure_ascii=False))]
        return self._end(self._at)

    def _arguments(self) -> bool:
        rest = self._rest
        while self._at < len(rest):
            if not self._json.read(rest[self._at]):
                self._state = self._raw
                return True
            self._at += 1
            if self._json.depth == 1:
                self._tell(self._at)
                self._state = self._tail
                return True
        self._tell(len(rest))
        return False

    def _raw(self) -> bool:
        """Arguments that are no JSON."""
        closer = self._format.closer
        end = self._rest.find(closer) if closer else -1
        if end >= 0:
            self._tell(end)
            return self._end(0)
        self._tell(len(self._rest) - (0 if self._last else _overlap(self._rest, closer)))
        return False

    def _tail(self) -> bool:
        """What a call has behind its arguments; it is whole without its last bracket, too."""
        for at, char in enumerate(self._rest):
            if not self._json.read(char):
                return self._end(at)
            if self._json.depth == 0:
                return self._end(at + 1)
        self._rest = ""
        return False

    def _end(self, at: int) -> bool:
        self._events.append(Ended())
        self._rest = self._rest[at:]
        self.full = self._one
        self._state = self._nothing if self._one else self._behind
        return True

    def _nothing(self) -> bool:
        self._rest = ""
        return False

    def _behind(self) -> bool:
        """The end mark, and whether another call follows at once."""
        rest, closer = self._rest, self._format.closer
        blank = len(rest) - len(rest.lstrip())
        if closer and rest[blank:].startswith(closer):
            self._rest, self._state = rest[blank + len(closer) :], self._text
            return True
        if not self._last and closer.startswith(rest[blank:]):
            return False
        if self._format.again:
            end = _past(self._format.between, rest)
            if end == len(rest) and not self._last:
                return False
            if rest.startswith("{", end):
                self._rest = rest[end:]
                return self._open(0)
            rest = rest[len(rest[:end].rstrip()) :]
        self._rest, self._state = rest, self._text
        return True

    def _say(self, length: int) -> None:
        """So much is text."""
        if length:
            self._events.append(Said(self._rest[:length]))
            self._rest = self._rest[length:]

    def _tell(self, length: int) -> None:
        """So much belongs to the arguments."""
        if length:
            self._events.append(Arguments(self._rest[:length]))
            self._rest, self._at = self._rest[length:], 0


def _parsed(text: str) -> dict[str, Any] | None:
    """A JSON object, if it is one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _past(pattern: str, text: str, start: int = 0) -> int:
    """Where what the pattern (which may be nothing) matches ends."""
    found = re.compile(pattern).match(text, start)
    return found.end() if found else start


def _overlap(text: str, mark: str) -> int:
    """The longest end of `text` that `mark` begins with, short of the whole."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)
