"""The kernels that a job was begun with: the first worker of all writes them down, the others are given them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_engine.errors import InputError
from sparse_engine.files import create, parsed_json

from .job import KERNELS


class JobKernels:
    """``kernels.json`` of a job's folder.

    Args:
        out: the folder.
        mixed: whether others will do as well.

    Attributes:
        choices: what a worker loads the engine with, as ``tactics.fixing`` takes it; None where nobody has chosen yet.

    Raises (on construction, too):
        InputError: the file is damaged.
    """

    def __init__(self, out: Path, mixed: bool = False) -> None:
        self._out, self._mixed = out, mixed
        self.choices: dict[str, Any] | None = self._stored()[1] if (out / KERNELS).exists() else None

    def fit(self, kernels: dict[str, Any]) -> bool:
        """Whether a worker has the job's kernels. False: it is to load the engine again with ``choices``.

        Raises:
            InputError: it has not, although it was given them.
            OutputError: they cannot be written down.
        """
        if create(self._out / KERNELS, json.dumps(kernels, indent=1).encode() + b"\n"):
            self.choices = kernels["choices"]
            return True
        facts, choices = self._stored()
        was_given, self.choices = self.choices is not None, choices
        found = differences(facts, kernels["facts"])
        if not found or self._mixed:
            return True
        if not was_given:  # another command was the first, at the same moment
            return False
        raise InputError(
            f"{self._out} was begun with other kernels: {'; '.join(found)}",
            "go on where it was begun, or with --mixed-machines: rounding will differ between chunks",
        )

    def _stored(self) -> tuple[dict[str, Any], dict[str, Any]]:
        path = self._out / KERNELS
        try:
            found = parsed_json(path.read_bytes())
            facts, choices = found["facts"], found["choices"]
            if not isinstance(facts, dict) or not isinstance(choices, dict):
                raise TypeError("it holds something else")
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise InputError(f"{path} is damaged: {error}", "name a new folder") from error
        return facts, choices


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In what two workers' kernels differ, in words; nothing where their images are the same to the bit."""
    found = []
    for name in dict.fromkeys([*there, *here]):
        old, new = there.get(name), here.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
            if changed:
                first = changed[0]
                words = f"{first} ran {old.get(first)}, here {new.get(first)}"
                found.append(words if len(changed) == 1 else f"{words}, and {len(changed) - 1} more of its {name}")
        elif old != new:
            found.append(f"{name} was {old}, here {new}")
    return found
