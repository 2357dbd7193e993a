"""Options of the commands that start processes, on this machine or on a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from finetune.executors import EXECUTORS

if TYPE_CHECKING:
    from finetune.executors.slots import Slots


def executor_options(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for the options ``--executor`` and ``--ray-address``; `what` is the help text of the first."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        address = click.option(
            "--ray-address",
            metavar="URL",
            envvar="RAY_API_SERVER_ADDRESS",
            help="URL of the Ray dashboard. Default: http://127.0.0.1:8265. All machines must share the workspace.",
        )
        executor = click.option("--executor", type=click.Choice(EXECUTORS), default="local", show_default=True, help=what)
        return executor(address(command))

    return decorate


def slots_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--slots`` and the executor options to a command whose runs can be executed in parallel; see `pop_slots`."""
    slots = click.option(
        "--slots",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Number of runs in parallel, each in a process of its own.",
    )
    return slots(executor_options("Where these processes run.")(command))


def pop_slots(given: dict[str, Any]) -> Slots | None:
    """Pop the values of `slots_options` from a command's arguments; return None if runs are sequential in this process."""
    slots, executor, address = given.pop("slots"), given.pop("executor"), given.pop("ray_address")
    if slots == 1 and executor == "local":
        return None
    from finetune.executors.slots import Slots

    return Slots.of(executor, slots, ray_address=address)
