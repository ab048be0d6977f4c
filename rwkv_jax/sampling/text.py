"""Stop strings in streamed text."""

from collections.abc import Sequence


class StopStrings:
    """Passes text through until a stop string is complete; no part of that string is passed.

    Text that may become a stop string is held back. If there are several, the one completed first
    counts; of two completed at once, the longer. How the text was cut makes no difference.

    >>> gate = StopStrings(["\\n\\n"])
    >>> gate.push("one\\n"), gate.push("two\\n"), gate.push("\\nthree"), gate.reached
    ('one', '\\ntwo', '', True)
    """

    def __init__(self, stops: str | Sequence[str] = ()):
        stops = (stops,) if isinstance(stops, str) else stops
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.reached = False
        """A stop string is complete; text pushed from now on is dropped."""

    def push(self, text: str) -> str:
        """The part of the text so far that can now be passed."""
        if self.reached:
            return ""
        self._held += text
        # End and start of each complete stop string; the minimum ends first, and is the longest.
        complete = [
            (start + len(stop), start)
            for stop in self._stops
            if (start := self._held.find(stop)) >= 0
        ]
        if complete:
            self.reached = True
            _, cut = min(complete)
        else:
            cut = len(self._held) - self._undecided()
        passed, self._held = self._held[:cut], "" if self.reached else self._held[cut:]
        return passed

    def flush(self) -> str:
        """The text held back, once no more follows."""
        held, self._held = self._held, ""
        return held

    def _undecided(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(len(self._held), longest), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
