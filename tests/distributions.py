"""What a wheel's extras bring, out of the environment that the tests run in: without the network, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(wheel: Distribution, extras: Iterable[str]) -> tuple[list[Distribution], list[str]]:
    """What an installed wheel needs with some of its extras, and what that needs in turn.

    Returns:
        (the distributions that are here, what is not here or too old).
    """
    asked: dict[str, set[str]] = {}
    here: dict[str, Distribution] = {canonicalize_name(wheel.name): wheel}
    absent: list[str] = []
    waiting = [(wheel, {"", *extras})]
    while waiting:
        needing, wanted = waiting.pop()
        for requirement in map(Requirement, needing.requires or ()):
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in wanted):
                continue
            name, more = canonicalize_name(requirement.name), {"", *requirement.extras}
            candidates = [here[name]] if name in here else distributions(name=name)
            found = next((each for each in candidates if _fits(each, requirement)), None)
            if found is None:
                absent.append(str(requirement))
                continue
            here[name] = found
            if not more <= asked.setdefault(name, set()):
                asked[name] |= more
                waiting.append((here[name], more))
    return [each for each in here.values() if each is not wheel], absent


def _fits(found: Distribution, requirement: Requirement) -> bool:
    return requirement.specifier.contains(found.version, prereleases=True)


def expose(found: Distribution, folder: Path) -> None:
    """Make a distribution's packages and its metadata importable from a folder, by links.

    A folder without ``__init__.py`` may be several distributions': its files are linked one by one.
    """
    for file in found.files or ():
        if file.parts[0] == "..":  # programs and manual pages
            continue
        top = Path(str(found.locate_file(file.parts[0])))
        whole = len(file.parts) == 1 or top.suffix == ".dist-info" or (top / "__init__.py").is_file()
        link = folder / (top.name if whole else file)
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(top if whole else Path(str(found.locate_file(file))))
