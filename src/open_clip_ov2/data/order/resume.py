"""The state of a loader as plain numbers and text, and where a new loader continues from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_clip_ov2.data.order.assignment import Position, Positions
from open_clip_ov2.errors import UserError

logger = logging.getLogger(__name__)

VERSION = 1


@dataclass(frozen=True)
class Start:
    """Where the consumers of all processes begin in an epoch of which `batches_done` are over.

    No positions: at the beginning. `history`: see Assignment.
    """

    batches_done: int = 0
    positions: Positions = ()
    history: tuple[Positions, ...] = ()


class Progress:
    """How far one process has come in an epoch: batches delivered, and the position of each of its consumers.

    `samples_done` counts over all processes; `consumers` is how many each process has.
    """

    def __init__(self, start: Start, rank: int, consumers: int, samples_done: int) -> None:
        self.batches_done, self.samples_done, self.history = start.batches_done, samples_done, start.history
        self._first = rank * consumers
        mine = start.positions[self._first : self._first + consumers] or (Position(),) * consumers
        self.positions = [Position(one.pass_index, one.taken, list(one.sizes)) for one in mine]

    def add(self, after: Mapping[int, Position], global_batch: int) -> None:
        """Count a delivered batch; `after` is where the consumers that it came from stand now."""
        assert after
        for consumer, now in after.items():
            before = self.positions[consumer - self._first]
            sizes = before.sizes if now.pass_index == before.pass_index else []
            assert isinstance(sizes, list)
            sizes.extend(now.sizes)  # in place: there may be very many
            self.positions[consumer - self._first] = Position(now.pass_index, now.taken, sizes)
        self.batches_done += 1
        self.samples_done += global_batch


def check_states(states: Sequence[dict[str, Any]], identity: dict[str, Any], moved: bool = False) -> None:
    """Raises UserError unless these are the states of all processes at one batch, for the data of `identity`.

    `moved`: as many shards or rows under other names count as the same data, with a warning.
    """
    if not states:
        raise UserError("cannot resume: the checkpoint holds no data position; start without --resume")
    for rank, state in enumerate(states):
        if state.get("version") != VERSION:
            raise UserError(
                f"cannot resume: the data position has version {state.get('version')}, this open_clip_ov2 reads "
                f"version {VERSION}; use the release that wrote the checkpoint"
            )
        if (state["rank"], state["world_size"]) != (rank, len(states)):
            raise UserError(
                f"cannot resume: expected the data position of process {rank} of {len(states)}, found that of process "
                f"{state['rank']} of {state['world_size']}; all are needed, in order"
            )
        for name in ("epoch", "batches_done", "workers", "batch_size"):
            if state[name] != states[0][name]:
                raise UserError(
                    f"cannot resume: {name} is {state[name]} for process {rank} and {states[0][name]} for process 0: "
                    "the checkpoint mixes states of two different steps; use another one"
                )
        for name, flag in (("seed", "--seed"), ("shuffle_buffer", "--shuffle-buffer")):
            if state[name] != identity[name]:
                raise _differs(flag, str(state[name]), str(identity[name]))
        _check_data(state["data"], identity["data"], moved)


def _check_data(old: dict[str, Any], new: dict[str, Any], moved: bool) -> None:
    if old == new:
        return
    before, now = _counts(old), _counts(new)
    if moved and before == now:
        logger.warning(
            "--train-data has other names than in the checkpoint but as many (%s): treated as the same data, moved "
            "(--override)", now,
        )  # fmt: skip
        return
    raise _differs("--train-data", before, now if now != before else f"others ({now})")


def _counts(data: dict[str, Any]) -> str:
    """The numbers of a source's fingerprint: `3 shards`, or `3 resampled shards`."""
    kind = "resampled " if data.get("resampled") else ""
    numbers = ((name, value) for name, value in data.items() if name != "resampled" and not isinstance(value, str))
    return ", ".join(f"{value} {kind}{name}" for name, value in numbers)


def _differs(flag: str, old: str, new: str) -> UserError:
    return UserError(
        f"cannot resume: {flag} was {old} when the checkpoint was written and is {new} now; use the same, "
        "or start a new run (in the middle of an epoch --override changes neither seed nor amount of data)"
    )


def pack(positions: Sequence[Position]) -> list[list[Any]]:
    return [[position.pass_index, position.taken, list(position.sizes)] for position in positions]


def unpack(rows: Sequence[Sequence[Any]]) -> Positions:
    return tuple(Position(pass_index, taken, tuple(sizes)) for pass_index, taken, sizes in rows)


def start_from(states: Sequence[dict[str, Any]], consumers: int, resampled: bool, batches_done: int) -> Start:
    """Where each of so many consumers begins: where an old one stopped, if there were as many.

    Otherwise all begin with the earliest pass that is not over, and `history` says what of it has been seen. A
    resampled pass has no rest to deal out: a new pass is drawn.
    """
    stopped = tuple(position for state in states for position in unpack(state["positions"]))
    history = tuple(unpack(positions) for positions in states[0]["history"])
    if len(stopped) == consumers:
        return Start(batches_done, stopped, history)
    if resampled:
        next_pass = 1 + max(position.pass_index for position in stopped)
        return Start(batches_done, (Position(next_pass),) * consumers)
    first = min(position.pass_index for position in stopped)
    seen = [one for one in (*history, stopped) if max(position.pass_index for position in one) >= first]
    return Start(batches_done, (Position(first),) * consumers, tuple(seen))
