"""The log beside the output: what happened, a JSON object a line, so that it outlives the machine."""

from __future__ import annotations

import contextlib
import datetime
import json
from typing import Any

from pipeline.errors import UserError
from pipeline.storage.store import Store

LOG = "fapm/log.jsonl"


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
        line = json.dumps({"time": when, "event": event, **facts}, ensure_ascii=False)
        with contextlib.suppress(UserError):
            now = event in ("begun", "finished", "failed", "stopped")
            self._folder.append(LOG, line.encode(errors="replace") + b"\n", now)


def read_log(folder: Store) -> list[dict[str, Any]]:
    """The log's events, the oldest first; a line that was not written whole is left out."""
    events = []
    for line in folder.read(LOG).splitlines() if folder.has(LOG) else ():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and {"time", "event"} <= event.keys():
                events.append(event)
    return events
