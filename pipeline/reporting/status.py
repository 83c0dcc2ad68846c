"""How far a run is, from its output folder alone: while it is at work, and after it has ended or died."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from fapm.errors import UserError, duration, plural
from fapm.layout import MANIFEST, RUN
from fapm.log import read_log
from fapm.recipe import format_bytes
from fapm.reporting.text import fields_text, layout
from fapm.schedule import COUNTED, SAMPLED, WRITTEN
from fapm.storage.address import open_store
from fapm.storage.lease import LEASE_SECONDS, last_sign_of_life
from fapm.storage.store import Store

_STEPS = (SAMPLED, COUNTED, WRITTEN)
_RECENT_SECONDS = 120.0  # of which the rate is


def status_facts(out: str) -> dict[str, Any]:
    """How far the run in the folder `out` is.

    `state` is `finished`, `running`, `failed` or `stopped` (it said so itself), or `died` (it did not). Bytes are input
    bytes that the current try deals with, some of them twice where groups lie in several shards; `bytes_per_second`
    is of the last minutes; `seconds_left` is None where nothing is known of the rate or the run is not at work.
    `seconds` are added up over all workers and pass at the same time.

    Raises:
        UserError: no run was ever begun there.
    """
    folder = open_store(out)
    if not folder.exists():
        raise UserError(f"there is no folder {out}")
    events = read_log(folder)
    begins = [i for i, event in enumerate(events) if event["event"] == "begun"]
    if not begins or not folder.has(RUN):
        raise UserError(f"{out} holds no run of fapm")
    begun, since = events[begins[-1]], events[begins[-1] + 1 :]
    life = last_sign_of_life(folder)
    steps = [event for event in since if event["event"] in _STEPS]
    total = begun.get("bytes", 0) + sum(event["bytes"] for event in since if event["event"] == "expect")
    done = sum(event.get("progress_bytes", 0) for event in steps)
    state = _state(folder, since, life[1] if life else None)
    now = datetime.datetime.now(datetime.UTC) if state == "running" else _time(events[-1])
    rate = _rate(steps, _time(begun), max(now, _time(events[-1])))
    ended = [event for event in since if event["event"] in ("failed", "stopped")]
    return {
        "out": out,
        "state": state,
        "shards": begun["shards"],
        "shards_done": begun["resumed"] + sum(event["event"] == WRITTEN for event in steps),
        "bytes": total,
        "bytes_done": done,
        "bytes_per_second": rate,
        "seconds_left": (total - done) / rate if rate and state == "running" else None,
        "begun": _text(begun),
        "last_event": _text(events[-1]),
        "tries": len(begins),
        "held_by": life[0] if life else None,
        "silent_seconds": life[1] if life else None,
        "error": ended[-1].get("error", "") if ended and state != "running" else None,
        "asked_workers": next((event["workers"] for event in since if event["event"] == "asked"), None),
        "workers": _workers(since),
        "lost": [
            {"time": _text(event), "where": event["where"] or "", "how": event["how"]}
            for event in since
            if event["event"] == "lost"
        ],
        "retried": sum(event["tries"] - 1 for event in steps),
        "seconds": {what: sum(event.get(what, 0.0) for event in steps) for what in ("reading", "computing", "writing")},
    }


def _state(folder: Store, since: Sequence[dict[str, Any]], silent: float | None) -> str:
    if silent is not None and silent < LEASE_SECONDS:
        return "running"
    if folder.has(MANIFEST):
        return "finished"
    last = since[-1]["event"] if since else ""
    return last if last in ("failed", "stopped") else "died"


def _time(event: dict[str, Any]) -> datetime.datetime:
    found: datetime.datetime = event["time"]
    return found


def _text(event: dict[str, Any]) -> str:
    return _time(event).isoformat(timespec="milliseconds")


def _rate(steps: Sequence[dict[str, Any]], begun: datetime.datetime, now: datetime.datetime) -> float | None:
    """Bytes a second of the last minutes, or of all the time if nothing was finished in them."""
    for start in (max(begun, now - datetime.timedelta(seconds=_RECENT_SECONDS)), begun):
        recent = [event for event in steps if _time(event) > start]
        if recent and now > start:
            done: float = sum(event.get("progress_bytes", 0) for event in recent)
            return done / (now - start).total_seconds()
    return None


def _workers(since: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are ready or have done something, in the order in which they were first heard of."""
    found: dict[str, dict[str, Any]] = {}
    for event in since:
        where = event.get("where")
        if not where or event["event"] not in (*_STEPS, "ready", "lost"):
            continue
        worker = found.setdefault(where, {"where": where, "steps": 0, "read_bytes": 0, "lost": None})
        if event["event"] == "lost":
            worker["lost"] = event["how"]
        elif event["event"] in _STEPS:
            worker["steps"] += 1
            worker["read_bytes"] += event["read_bytes"]
        worker["last_heard"] = _text(event)
    return list(found.values())


_STATES = {
    "finished": "finished; `fapm report` tells what it did",
    "running": "running",
    "failed": "failed; mend what it says and give the same command again: it goes on from here",
    "stopped": "stopped; the same command goes on from here",
    "died": "not at work any more, and did not say why; the same command goes on from here",
}


def status_text(facts: dict[str, Any]) -> str:
    """That as a table."""
    done, total, rate = facts["bytes_done"], facts["bytes"], facts["bytes_per_second"]
    share = f" ({done / total:.0%})" if total else ""
    fields = [
        ("shards", f"{facts['shards_done']:,} of {facts['shards']:,}"),
        (
            "bytes",
            f"{format_bytes(done)} of {format_bytes(total)}{share}" + (f", {format_bytes(rate)}/s" if rate else ""),
        ),
    ]
    if facts["seconds_left"] is not None:
        fields.append(("left", duration(facts["seconds_left"])))
    if facts["held_by"]:
        heard = f", last heard of {duration(facts['silent_seconds'])} ago"
        fields.append(("driver", facts["held_by"] + heard))
    fields.append(("begun", facts["begun"] + (f", try {facts['tries']}" if facts["tries"] > 1 else "")))
    if facts["error"]:
        fields.append(("error", facts["error"]))
    fields += _workers_text(facts)
    spent = {what: seconds for what, seconds in facts["seconds"].items() if seconds}
    if spent:
        fields.append(("spent", ", ".join(f"{duration(s)} {what}" for what, s in spent.items())))
    return f"{facts['out']}: {_STATES[facts['state']]}\n" + fields_text(fields)


_SHOWN = 8  # workers


def _workers_text(facts: dict[str, Any]) -> list[tuple[str, str]]:
    living = [worker for worker in facts["workers"] if not worker["lost"]]
    asked = f" of {facts['asked_workers']:,} asked for" if facts["asked_workers"] else ""
    lost = f", {len(facts['lost'])} lost" if facts["lost"] else ""
    again = f", {plural(facts['retried'], 'shard')} begun again" if facts["retried"] else ""
    lines = [("workers", f"{len(living):,}{asked}{lost}{again}")]
    rows = [
        (worker["where"], plural(worker["steps"], "step"), format_bytes(worker["read_bytes"]) + " read")
        for worker in sorted(living, key=lambda worker: -worker["steps"])[:_SHOWN]
    ]
    lines += [("", line) for line in layout(rows, right=(1, 2)).splitlines()] if rows else []
    lines += [("", f"… {len(living) - _SHOWN:,} more")] if len(living) > _SHOWN else []
    for loss in facts["lost"][-_SHOWN:]:
        lines.append(("", f"{loss['where'] or 'one that had not begun'} {loss['how']} at {loss['time']}"))
    return lines
