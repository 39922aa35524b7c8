"""From tokens to text while they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


class TokenText:
    """Decodes a growing list of tokens piece by piece.

    A token may be a part of a character, or change how its neighbours are spelt (the space that
    SentencePiece takes off a text's first word). So the tokens after the last finished piece are
    decoded together with the piece before them, and what ends in an unfinished character waits.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self._context = 0  # where the last finished piece begins,
        self._given = 0  # and where it ends

    def add(self, token: int) -> str:
        """The text that this token finishes, perhaps none."""
        self.tokens.append(token)
        text = self._decode(self._context, len(self.tokens))
        if text.endswith(REPLACEMENT):
            return ""
        return self._give(text)

    def rest(self) -> str:
        """What is left at the end; a character that stayed unfinished becomes U+FFFD."""
        return self._give(self._decode(self._context, len(self.tokens)))

    def _give(self, text: str) -> str:
        piece = text[len(self._decode(self._context, self._given)) :]
        self._context, self._given = self._given, len(self.tokens)
        return piece

    def _decode(self, start: int, end: int) -> str:
        tokens = self.tokens[start:end]
        return self.tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""


class StopStrings:
    """Lets text through until one of ``stops`` begins in it.

    The end of the text that may be the beginning of a stop string waits until it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self._waiting = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """(the text that may be shown, whether a stop string follows it)."""
        text, self._waiting = self._waiting + piece, ""
        starts = [start for stop in self.stops if (start := text.find(stop)) >= 0]
        if starts:
            return text[: min(starts)], True
        shown = len(text) - max((overlap(text, stop) for stop in self.stops), default=0)
        self._waiting = text[shown:]
        return text[:shown], False

    def rest(self) -> str:
        """What waited, once no more text will come."""
        waiting, self._waiting = self._waiting, ""
        return waiting


class Thoughts:
    """Parts a streamed answer at the marks around its thoughts.

    ``inside`` says whether it begins in the middle of one, the prompt having opened it.
    """

    def __init__(self, start: str, end: str, *, inside: bool) -> None:
        self.start, self.end, self.inside = start, end, inside
        self._waiting = ""

    def add(self, piece: str) -> list[tuple[str, bool]]:
        """(text, whether it is thought) in order; a mark belongs to its thought."""
        text, parts = self._waiting + piece, []
        while True:
            mark = self.end if self.inside else self.start
            before, found, after = text.partition(mark)
            if not found:
                break
            parts += [(before, self.inside), (mark, True)]
            self.inside, text = not self.inside, after
        known = len(text) - overlap(text, mark)
        parts.append((text[:known], self.inside))
        self._waiting = text[known:]
        return [part for part in parts if part[0]]

    def rest(self) -> list[tuple[str, bool]]:
        """What waited, once no more text will come."""
        waiting, self._waiting = self._waiting, ""
        return [(waiting, self.inside)] if waiting else []


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of ``stop`` that ``text`` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
