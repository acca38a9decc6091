"""Options in groups: to Typer they are options like all others, to the command one object."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

from sparse_engine.cli.groups import grouped
from sparse_engine.cli.main import COMMANDS


@dataclass(frozen=True)
class Basis:
    size: Annotated[int, typer.Option(help="How large.")] = 3


@dataclass(frozen=True)
class Shape(Basis):
    name: Annotated[str | None, typer.Option("--called", help="How called.")] = None


def run(*arguments: str) -> tuple[str, Shape, bool]:
    seen = []

    @grouped
    def command(
        what: Annotated[str, typer.Argument()],
        *,
        shape: Shape,
        quick: Annotated[bool, typer.Option("--quick")] = False,
    ) -> None:
        seen.append((what, shape, quick))

    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    app(list(arguments), standalone_mode=False)
    return seen[0]


def test_a_group_comes_as_one_object_with_its_defaults() -> None:
    assert run("it") == ("it", Shape(3, None), False)
    assert run("it", "--size", "5", "--called", "x", "--quick") == ("it", Shape(5, "x"), True)


def test_an_option_of_a_group_is_checked_as_any_other() -> None:
    with pytest.raises(Exception, match="valid int"):
        run("it", "--size", "large")


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_option_of_a_command_has_help(module: object) -> None:
    for option in inspect.signature(module.command, eval_str=True).parameters.values():  # type: ignore[attr-defined]
        assert option.annotation.__metadata__[0].help, option.name
