"""
What goes wrong between a client and the test Hub now and then, drawn from a seed.

    hub.faults = Faults(seed=0, kinds=DROPS, share=0.3)
"""

import random
import threading
from collections import Counter
from dataclasses import dataclass, field

RETRY_AFTER = 7  # seconds that a 429 asks for

UNTOUCHED = {"drop", "html"}  # nothing is done of what was asked for

UNANSWERED = {"drop", "lost"}

DROPS = ("drop", "lost", "half", "half sent")

KINDS = (*DROPS, 429, 500, 503, "slow")


@dataclass
class Faults:
    """
    Args:
        seed (`int`): which requests fail, and how, depends on it and on how many of a step there were, not on threads.
        kinds (`tuple`): what happens: `"drop"` closes the connection unheard, `"lost"` does what was asked for and
            closes it without an answer, `"half"` answers with half of the body, `"half sent"` closes when half of the
            request has come; `"slow"` pauses within the answer; a status is answered, 429 with `Retry-After`.
        share (`float`, *optional*, defaults to 1.0): of the requests.
        steps (`set[str]`, *optional*): of [`~helpers.hub_server.HubServer`]; by default all that have a name.
        most (`int`, *optional*): after so many no request fails.
        after (`int`, *optional*, defaults to 0): so many requests of those steps pass first.

    Attributes:
        done (`list[tuple[str, str | int]]`): step and kind of each.
    """

    seed: int
    kinds: tuple = KINDS
    share: float = 1.0
    steps: set | None = None
    most: int | None = None
    after: int = 0
    done: list = field(default_factory=list)

    def __post_init__(self):
        self._counts, self._lock = Counter(), threading.Lock()

    def draw(self, step):
        """What happens to a request, or `None`."""
        if step is None or (self.steps is not None and step not in self.steps):
            return None
        with self._lock:
            self._counts[step] += 1
            drawn = random.Random(f"{self.seed} {step} {self._counts[step]}")
            spared = self._counts.total() <= self.after or (self.most is not None and len(self.done) >= self.most)
            if spared or drawn.random() >= self.share:
                return None
            kind = drawn.choice(self.kinds)
            self.done.append((step, kind))
            return kind
