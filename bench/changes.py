"""A run against an earlier one: what became faster or slower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparse_engine.errors import InputError

from .arms import SPARSE
from .results_file import place, rows_of

Row = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One cell, or one batch, then and now.

    Attributes:
        where: in words.
        old_ms, new_ms: our sparse engine's median.
        old_speedup, new_speedup: over our own dense engine, with their intervals.
        same_machine: whether milliseconds can be compared at all.
        allowed: the loss that is not called one.
    """

    where: str
    old_ms: float
    new_ms: float
    old_speedup: Row
    new_speedup: Row
    same_machine: bool
    allowed: float

    @property
    def slowdown(self) -> float:
        """The new time over the old one."""
        return self.new_ms / self.old_ms

    @property
    def lost(self) -> bool:
        """Whether it is slower by more than was allowed: in time, or in a speed-up whose intervals do not meet."""
        slower = self.same_machine and self.slowdown > 1 + self.allowed
        fell = self.new_speedup["median"] < self.old_speedup["median"] * (1 - self.allowed)
        apart = self.new_speedup["high"] < self.old_speedup["low"]
        return slower or (fell and apart)

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.lost:
            return "slower"
        return "faster" if self.same_machine and self.slowdown < 1 - self.allowed else "as before"


def compare_results(old: Row, new: Row, allowed: float) -> list[Change]:
    """Hold what two runs measured alike side by side.

    Args:
        old, new: what results files hold.
        allowed: the share that a time may grow, or a speed-up fall, before it is called a loss.

    Raises InputError where the two measured nothing alike.
    """
    same_machine = old["machine"]["processor"] == new["machine"]["processor"] and old["threads"] == new["threads"]
    before = {_key(old, row): row for row in rows_of(old) if SPARSE in row.get("milliseconds", {})}
    changes = [
        Change(
            place(new, row),
            then["milliseconds"][SPARSE]["median"],
            row["milliseconds"][SPARSE]["median"],
            then["speedup"],
            row["speedup"],
            same_machine,
            allowed,
        )
        for row in rows_of(new)
        if SPARSE in row.get("milliseconds", {}) and (then := before.get(_key(new, row)))
    ]
    if not changes:
        raise InputError(
            "--compare-to: the two runs have no sparse measurement in common",
            "compare runs of the same preset or model, precision and batch",
        )
    return changes


def _key(results: Row, row: Row) -> tuple[Any, ...]:
    model = row.get("model") or results.get("model") or {}
    return results["kind"], results["precision"], row["batch"], repr(sorted(model.get("config", {}).items()))
