"""TensorBoard events, a file an epoch, where TensorBoard is installed."""

import io
import time
from pathlib import Path
from typing import Any

from vqae.checkpoint import write_whole


def write_events(folder: Path, line: dict[str, Any]) -> None:
    """Write an epoch's figures as events of its step; a file that an earlier process wrote for it is replaced.

    Each file is written whole: TensorBoard's own writer has a thread, in which a full disk would end as a traceback.

    Raises:
        UsageError: as `write_whole`.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import scalar, text
    except ImportError:
        return
    events = [Event(file_version="brain.Event:2")]
    for name, value in line.items():
        if isinstance(value, str):
            events.append(Event(step=line["step"], summary=text(name, value)))  # type: ignore[no-untyped-call]
        elif value is not None and name not in ("epoch", "step"):
            events.append(Event(step=line["step"], summary=scalar(name, value)))  # type: ignore[no-untyped-call]
    buffer = io.BytesIO()
    records = RecordWriter(buffer)
    for event in events:
        event.wall_time = time.time()
        records.write(event.SerializeToString())
    write_whole(folder / f"events.out.tfevents.{line['step']:010d}", buffer.getbuffer())
