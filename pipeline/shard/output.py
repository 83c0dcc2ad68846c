"""Output of one lane for one shard: its bytes on their way, and what is known of them when they are all there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fapm.formats.tensor import Sides
from fapm.layout import delta_facts_name, record_name, rows_name
from fapm.scoring.engine import DeviceEngine
from fapm.scoring.matrices import library
from fapm.shard.delta import Checked, DeltaWriter, promised
from fapm.shard.factors import Factors
from fapm.shard.lane import Lane
from fapm.shard.meter import Meter
from fapm.shard.writing import BUFFERS, AnySink, Direct, Sink
from fapm.storage.store import Store, Writer


@dataclass
class Output:
    """A shard on its way out.

    Attributes:
        lane: the run that it is of.
    """

    lane: Lane
    writer: Writer
    delta: DeltaWriter | None
    sink: AnySink

    def publish(self, checksum: str, sparse: dict[str, Any] | None, meter: Meter) -> int:
        """Publish the records of the shard, then the shard; returns how many bytes it has."""
        shard, out, emit = self.lane.task.shard, self.lane.out, self.lane.recipe.emit
        for lane in (self.lane, *self.lane.parts):
            out.write(rows_name(shard.index, lane.task.source), lane.rows.tobytes())
        nbytes = self.sink.nbytes if isinstance(self.sink, Factors) else shard.nbytes
        record: dict[str, Any] = {"name": shard.name, "nbytes": nbytes, "xxh3_128": checksum}
        if sparse and self.delta:
            record = sparse if emit == "delta" else {**record, "delta": sparse}
            out.write(delta_facts_name(shard.index), json.dumps(self.delta.tensors).encode())
        if any(tensor.operation == "matrices" for tensor in shard.tensors):
            record["library"] = library()
        record |= {"read_bytes": meter.read_bytes, "seconds": round(meter.seconds, 3)}
        out.write(record_name(shard.index), json.dumps(record).encode())
        self.writer.publish()
        return int(record["nbytes"]) + (sparse["nbytes"] if sparse and emit == "both" else 0)


def begin_output(
    lane: Lane, base: Store, device: DeviceEngine | None, buffer: int, first: DeltaWriter | None
) -> Output:
    """Begin the shard of a lane.

    Args:
        base: where it lies.
        device: from which elements come, and `buffer`: bytes of each buffer on their way from there.
        first: of the first lane, what has already been found of base.
    """
    shard, recipe = lane.task.shard, lane.recipe
    if recipe.emit == "adapter":
        factors = Factors(shard, lane.out)
        return Output(lane, factors, None, factors)
    writer, delta = _writers(lane, base, first)
    sink: AnySink
    if delta and recipe.emit == "delta" and device is None:
        sink = Direct(delta, shard.nbytes)
    elif device is None:
        sink = Sink(writer, shard.nbytes)
    else:
        sink = Sink(writer, shard.nbytes, [device.host(buffer) for _ in range(BUFFERS)], device.received)
    return Output(lane, writer, delta, sink)


def _writers(lane: Lane, base: Store, first: DeltaWriter | None) -> tuple[Writer, DeltaWriter | None]:
    """Writer of the shard's bytes; and the one that makes its sparse task vector of them, if that is wanted."""
    recipe, shard, writer = lane.recipe, lane.task.shard, None
    if recipe.emit != "delta":
        writer = lane.out.create(shard.name, shard.nbytes)
        if any(promised(tensor) for tensor in shard.tensors):
            writer = Checked(shard, writer)
        if recipe.emit == "checkpoint":
            return writer, None
    compress = recipe.delta_compression != "none"
    delta = DeltaWriter(shard, Sides(base, base), lane.out, compress, recipe.reversible, writer, first)
    return delta, delta
