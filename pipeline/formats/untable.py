"""Says what a stranger's Parquet table holds. Run as a process of its own, with little memory.

    python -I untable.py ROWS COLUMN...      the file on standard input

Answers with a line of JSON for some rows each, on its standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

_MEMORY = 96 << 20
_SECONDS = 60
_ROWS_AT_ONCE = 1024


def main() -> None:
    most, *columns = sys.argv[1:]
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # others reserve more than there may be
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from sandbox import give_up_the_world, limit, refuse  # type: ignore[import-not-found]

    sys.path.pop(0)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    data = sys.stdin.buffer.read()
    limit(_MEMORY + len(data), _SECONDS)
    with contextlib.suppress(OSError):  # elsewhere it is the limits alone
        give_up_the_world()
    try:
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        if file.metadata.num_rows > int(most):
            refuse(f"it has {file.metadata.num_rows} rows")
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            refuse(f"it has no column {missing[0]}")
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
            sys.stdout.write(json.dumps(batch.to_pylist(), default=repr) + "\n")
    except MemoryError:
        refuse("it takes more memory than any table of tensors")
    except Exception as error:  # whatever a stranger's file brings about
        refuse(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}")
    sys.stdout.flush()
    os._exit(0)  # pyarrow's threads sometimes abort a process at its end


if __name__ == "__main__":
    main()
