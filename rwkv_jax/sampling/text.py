"""From token ids to text that may be printed: whole characters, and nothing of a stop string."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on until one of some strings is complete; no part of that is ever passed on.

    Text that might yet become a stop string is held back. Of two stop strings the one completed
    first counts, of two completed at once the longer: how the text was cut makes no difference.

    >>> gate = StopStrings(["\\n\\n"])
    >>> gate.push("one\\n"), gate.push("two\\n"), gate.push("\\nthree"), gate.reached
    ('one', '\\ntwo', '', True)
    """

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.reached = False
        """A stop string is complete; whatever is pushed from now on is dropped."""

    def push(self, text: str) -> str:
        """The part of the text so far that can now be passed on."""
        if not self._stops:
            return text
        passed = []
        for character in "" if self.reached else text:
            self._held += character
            complete = [len(stop) for stop in self._stops if self._held.endswith(stop)]
            if complete:
                self.reached = True
                passed.append(self._held[: -max(complete)])
                self._held = ""
                break
            keep = self._beginnings()
            passed.append(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
        return "".join(passed)

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _beginnings(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        lengths = range(min(len(self._held), max(map(len, self._stops)) - 1), 0, -1)
        for length in lengths:
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
