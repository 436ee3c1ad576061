r"""Regular expressions of unknown origin, matched without backtracking: work grows with the text's length alone.

A subset of Python's `re` with its meaning: literals, `.`, `\d \w \s` and their opposites, classes, groups, `|`, `* + ?
{m,n}` (lazy ones too, which match the same), `^` and `$`. Back-references, looking ahead or behind, flags and `\b` are
refused. The expression becomes an automaton whose sets of states are computed when a text first needs them (Thompson
1968, "Regular Expression Search Algorithm").
"""

from collections.abc import Callable
from typing import NamedTuple

MAX_LENGTH = 1000
"""Characters that an expression may have."""
_MAX_STATES, _DEEPEST, _MAX_KEPT = 2000, 50, 5000

Test = Callable[[str], bool]
_START, _END = object(), object()


class PatternError(ValueError):
    """An expression that is not understood, or too large."""


class Pattern(NamedTuple):
    """An automaton: `edges[state]` are (test, next state), where the test is of a character, a place, or None."""

    edges: list[list[tuple[object, int]]]
    start: int
    end: int
    kept: dict[tuple[frozenset[int], str], frozenset[int]]

    def matches(self, text: str) -> bool:
        """True if the whole text fits, as in `re.fullmatch`."""
        states = self._closed({self.start}, _START)
        for letter in text:
            states = self._after(states, letter)
            if not states:
                return False
        return self.end in self._closed(set(states), _END, first=not text)

    def _after(self, states: frozenset[int], letter: str) -> frozenset[int]:
        known = self.kept.get((states, letter))
        if known is None:
            reached = {
                target for state in states for test, target in self.edges[state] if callable(test) and test(letter)
            }
            if len(self.kept) >= _MAX_KEPT:
                self.kept.clear()
            known = self.kept[states, letter] = self._closed(reached)
        return known

    def _closed(self, states: set[int], place: object = None, *, first: bool = False) -> frozenset[int]:
        """The states that are reached without a character."""
        passed = {None, place, *([_START] if first else [])}
        waiting = list(states)
        while waiting:
            for test, target in self.edges[waiting.pop()]:
                if not callable(test) and target not in states and (test is None or test in passed):
                    states.add(target)
                    waiting.append(target)
        return frozenset(states)


def compile(text: str) -> Pattern:  # noqa: A001
    """The automaton of an expression. Raises PatternError for what is no expression of the subset."""
    if len(text) > MAX_LENGTH:
        raise PatternError(f"has {len(text):,} characters, more than {MAX_LENGTH:,}")
    parser = _Parser(text)
    start, end = parser.choice(0)
    if parser.place < len(text):
        raise PatternError(f"has an unbalanced ) at {parser.place}")
    return Pattern(parser.edges, start, end, {})


def _in_range(low: str, high: str) -> Test:
    return lambda one: low <= one <= high


class _Parser:
    """Recursive descent over an expression; each method returns the first and last state of what it read."""

    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0
        self.edges: list[list[tuple[object, int]]] = []

    def choice(self, depth: int) -> tuple[int, int]:
        if depth > _DEEPEST:
            raise PatternError(f"has groups nested more than {_DEEPEST} deep")
        start, end = self._state(), self._state()
        while True:
            first, last = self._sequence(depth)
            self._edge(start, None, first)
            self._edge(last, None, end)
            if not self._take("|"):
                return start, end

    def _sequence(self, depth: int) -> tuple[int, int]:
        start = end = self._state()
        while self.place < len(self.text) and self.text[self.place] not in "|)":
            begin = self.place
            first, last = self._atom(depth)
            first, last = self._repeated(first, last, begin, depth)
            self._edge(end, None, first)
            end = last
        return start, end

    def _atom(self, depth: int) -> tuple[int, int]:
        letter = self._next()
        if letter == "(":
            if self._take("?") and not self._take(":"):
                raise PatternError("has a group that begins with (?, which is not supported")
            inside = self.choice(depth + 1)
            if not self._take(")"):
                raise PatternError("has an unbalanced (")
            return inside
        if letter in "*+?":
            raise PatternError(f"has nothing to repeat at {self.place - 1}")
        first, last = self._state(), self._state()
        self._edge(first, self._test(letter), last)
        return first, last

    def _test(self, letter: str) -> object:
        if letter == "^":
            return _START
        if letter == "$":
            return _END
        if letter == ".":
            return lambda one: one != "\n"
        if letter == "[":
            return self._class()
        if letter == "\\":
            return self._escaped()
        return lambda one: one == letter

    def _escaped(self) -> Test:
        letter = self._next()
        if letter in _CLASSES:
            return _CLASSES[letter]
        if letter in _CONTROLS:
            return lambda one: one == _CONTROLS[letter]
        if letter.isalnum():
            raise PatternError(f"has \\{letter}, which is not supported")
        return lambda one: one == letter

    def _class(self) -> Test:
        opposite, tests, begin = self._take("^"), [], self.place
        while self.place == begin or not self._take("]"):
            letter = self._next()
            if letter == "\\" and self.text[self.place : self.place + 1] in _CLASSES:
                tests.append(self._escaped())
                continue
            low = self._single(letter)
            following = self.text[self.place : self.place + 2]
            if following[:1] == "-" and following[1:] not in ("", "]"):
                self.place += 1
                high = self._single(self._next())
                if high < low:
                    raise PatternError(f"has the range {low}-{high}, which is the wrong way round")
                tests.append(_in_range(low, high))
            else:
                tests.append(_in_range(low, low))
        return lambda one: any(test(one) for test in tests) != opposite

    def _single(self, letter: str) -> str:
        if letter != "\\":
            return letter
        letter = self._next()
        if letter.isalnum() and letter not in _CONTROLS:
            raise PatternError(f"has \\{letter} in a class, which is not supported")
        return _CONTROLS.get(letter, letter)

    def _repeated(self, first: int, last: int, begin: int, depth: int) -> tuple[int, int]:
        counts = self._counts()
        if counts is None:
            return first, last
        after = self.place
        if self._take("?"):
            after = self.place
        if self.text[after : after + 1] in ("*", "+", "?") and after < len(self.text):
            raise PatternError(f"has a repeat of a repeat at {after}")
        low, high = counts
        start = end = self._state()
        copies = max(low, 1) if high is None else high
        for index in range(copies):
            # The first copy is what was read; of the others the text is read again.
            if index:
                self.place = begin
                first, last = self._atom(depth)
            self._edge(end, None, first)
            if index >= low:
                skipped = self._state()
                self._edge(end, None, skipped)
                self._edge(last, None, skipped)
                last_of = skipped
            else:
                last_of = last
            if high is None and index == copies - 1:
                self._edge(last, None, first)
            end = last_of
        self.place = after
        return start, end

    def _counts(self) -> tuple[int, int | None] | None:
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return counts
        if self.text[self.place : self.place + 1] != "{":
            return None
        inside, brace, _ = self.text[self.place + 1 :].partition("}")
        low, comma, high = inside.partition(",")
        if (
            not brace
            or not (low or comma)
            or not all(not one or one.isascii() and one.isdecimal() for one in (low, high))
        ):
            return None
        if len(inside) > 9:
            raise PatternError(f"has the count {{{inside[:20]}}}, which is too large")
        self.place += len(inside) + 2
        least, most = int(low or 0), (int(high) if high else None) if comma else int(low)
        if most is not None and most < least or max(least, most or 0) > _MAX_STATES:
            raise PatternError(f"has the count {{{inside}}}, which is the wrong way round or too large")
        return least, most

    def _state(self) -> int:
        if len(self.edges) >= _MAX_STATES:
            raise PatternError(f"needs more than {_MAX_STATES:,} states")
        self.edges.append([])
        return len(self.edges) - 1

    def _edge(self, start: int, test: object, end: int) -> None:
        self.edges[start].append((test, end))

    def _take(self, letter: str) -> bool:
        matches = self.text[self.place : self.place + 1] == letter
        self.place += matches
        return matches

    def _next(self) -> str:
        if self.place >= len(self.text):
            raise PatternError("ends in the middle")
        self.place += 1
        return self.text[self.place - 1]


_CLASSES: dict[str, Test] = {
    "d": str.isdecimal,
    "D": lambda one: not one.isdecimal(),
    "w": lambda one: one.isalnum() or one == "_",
    "W": lambda one: not (one.isalnum() or one == "_"),
    "s": str.isspace,
    "S": lambda one: not one.isspace(),
}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
