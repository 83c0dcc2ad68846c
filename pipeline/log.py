"""The log beside the output: what happened, a JSON object a line, so that it outlives the machine."""

from __future__ import annotations

import contextlib
import datetime
import json
from typing import Any

from pydantic import ValidationError

from fapm.errors import UserError, one_line
from fapm.layout import LOG
from fapm.schemas import Event
from fapm.storage.store import Store

_MOST_BYTES, _MOST_LINES, _LONGEST_LINE = 64 << 20, 200_000, 1 << 16


class Log:
    """Appends to the log of one output folder. A log that cannot be written is no reason to fail."""

    def __init__(self, folder: Store):
        self._folder = folder

    def add(self, event: str, **facts: Any) -> None:
        """A line with the time (UTC), what happened, and more.

        `begun`, `finished`, `failed` and `stopped` are the run's; `sampled`, `counted` and `shard` (written) those of
        a shard; `asked`, `ready` and `lost` those of workers in a cluster; `expect` says that more is to be read.
        """
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        if "error" in facts:
            facts["error"] = one_line(facts["error"])
        line = json.dumps({"time": when, "event": event, **facts}, ensure_ascii=False)
        with contextlib.suppress(UserError):
            now = event in ("begun", "finished", "failed", "stopped")
            self._folder.append(LOG, line.encode(errors="replace") + b"\n", now)


def read_log(folder: Store) -> list[dict[str, Any]]:
    """The log's events, the oldest first; a line that was not written whole is left out.

    Each has what `schemas.Event` says, `time` as a datetime.

    Raises:
        UserError: it is longer than the log of any run.
    """
    if not folder.has(LOG):
        return []
    if folder.size(LOG) > _MOST_BYTES:
        raise UserError(f"{folder.at(LOG)} is longer than the log of any run")
    data = folder.read(LOG)
    if data.count(b"\n") > _MOST_LINES:
        raise UserError(f"{folder.at(LOG)} has more lines than the log of any run")
    events = []
    for line in data.split(b"\n"):
        with contextlib.suppress(ValidationError):
            if len(line) > _LONGEST_LINE:
                continue
            events.append(Event.model_validate_json(line).model_dump())
    return events
