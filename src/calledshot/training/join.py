"""How ranks begin together: the first prepares the data and the run, and tells the others what to work on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from calledshot.recipe import Layout, RunError, ShotError, UsageError
from calledshot.training.world import World


@dataclass(frozen=True)
class Order:
    """What the leading rank tells the others to work on, as JSON can say it."""

    run: str
    """Its folder, absolute."""
    incarnation: int
    recipe: str
    """TOML, as asked for."""
    layout: dict[str, int]
    parent: tuple[str, int] | None
    """Folder and step of the run that a fork comes from."""
    fresh_optimizer: bool


@contextmanager
def joined() -> Iterator[World]:
    """This process's place in its job, whose connections are closed at the end. RunError where another rank's end ends
    this one.
    """
    world = World.join()
    try:
        yield world
    except RuntimeError as error:
        if world.size == 1 or isinstance(error, ShotError) or not _lost(error):
            raise
        raise RunError(
            f"rank {world.rank} lost its connection: another rank ended first, and its log in the newest of the run's "
            "incarnations/*/logs says why; the same command goes on from the last checkpoint"
        ) from error
    finally:
        world.leave()


def _lost(error: RuntimeError) -> bool:
    text = str(error)
    return any(
        sign in text for sign in ("Connection closed", "Connection reset", "Broken pipe", "NCCL", "gloo/transport")
    )


@contextmanager
def leading(world: World) -> Iterator[None]:
    """For the leading rank: where what is done inside ends without an order, the others end with its exit code."""
    code = 1
    try:
        yield
        code = 0
    except UsageError:
        code = 2
        raise
    finally:
        if world.size > 1 and not world.begun:
            world.tell({"end": code})


def begin(world: World, order: Order) -> None:
    """Tells the others, and forms the groups with them."""
    world.begun = True
    world.tell({"order": asdict(order)})
    world.arrange(Layout(**order.layout))


def wait_for_order(world: World) -> Order | int:
    """What to work on, or the exit code to end with."""
    said: dict[str, Any] = world.tell()
    if "end" in said:
        return int(said["end"])
    order = said["order"]
    return Order(**{**order, "parent": None if order["parent"] is None else tuple(order["parent"])})
