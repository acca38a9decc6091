"""How to measure: what the command line asks for, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_engine import arguments

# A runtime may differ from our dense fp32 engine by this share of the largest value before it is said to compute
# something else.
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 3e-2, "bf16": 1e-1, "int8": 1.5e-1}
PRECISIONS = tuple(TOLERANCE)


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        precision: of our own engines. Where a backend has no dense engine in it, the dense one is fp32, and said to be.
        threads: for every runtime; None is one per core.
        repeats: how often everything is loaded afresh and timed for ``seconds``.
        seconds: of timing in a repeat, for one batch of one model, all candidates together.
        peers: time the other runtimes too.
        backends: names as ``--backend`` takes them; ratios are of the first.
        steps: of a whole sample, where that is timed beside the single step; None leaves it out.
        self_test: time the dense engine against itself in place of the sparse one.
    """

    precision: str = "fp32"
    threads: int | None = None
    repeats: int = 5
    seconds: float = 0.4
    peers: bool = True
    backends: tuple[str, ...] = ("auto",)
    steps: int | None = None
    self_test: bool = False

    def __post_init__(self) -> None:
        numbers = {
            "threads": arguments.threads(self.threads),
            "repeats": arguments.whole_number("repeats", self.repeats, 1),
            "seconds": arguments.real_number("seconds", self.seconds),
            "peers": arguments.truth("peers", self.peers),
            "steps": None if self.steps is None else arguments.whole_number("steps", self.steps, 1),
            "self_test": arguments.truth("self_test", self.self_test),
        }
        for name, value in numbers.items():
            object.__setattr__(self, name, value)
