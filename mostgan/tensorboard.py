"""What TensorBoard shows of a run: the values of stats.jsonl, which stays the record, and grids.

pip install 'mostgan[tensorboard]' && tensorboard --logdir runs
"""

import io
import math
import os
from contextlib import suppress

from PIL import Image

from mostgan.progress import read_stats
from mostgan.video import film_strips, grid

LARGE = 1000  # bytes of an event: that of a number has some sixty


class Board:
    """Writes events into the folder tensorboard/ of a run; a step is a real frame, as `frames` in
    stats.jsonl.

    done: the frames that the run goes on from. Events of later ones, which it makes anew, are taken
    back, and so are those that its stats.jsonl has not or has otherwise; the lines without events,
    of a time without TensorBoard, become events. On the disk when a method returns. An error of the
    disk is said by `say`, and ends the events, not the training.
    """

    def __init__(self, run, done, say=print):
        from torch.utils.tensorboard import SummaryWriter

        folder, self.say = run / "tensorboard", say
        is_new, lines = not any(folder.glob("events*")), read_stats(run)
        agree = 0 if is_new else agreement(lines, events_of(folder), done)
        # TensorBoard forgets what it has read of this step and later ones.
        self.writer = SummaryWriter(str(folder), purge_step=None if is_new else agree + 1)
        for line in lines:
            if line["frames"] > agree:
                self.add_line(line)

    def add_line(self, line):
        """Adds the values of a line of stats.jsonl, a dict."""

        def write():
            for name, value in _values(line).items():
                self.writer.add_scalar(name, value, line["frames"])

        self._try(write)

    def add_grid(self, name, clips, rows, columns, step, fps):
        """Adds clips uint8 [rows · columns, T, 3, H, W], side by side and moving (TensorBoard plays
        GIFs), and as a picture with a row of frames per clip.
        """

        def write():
            self.writer.add_image(f"{name}/frames", film_strips(clips[: 2 * rows], 8), step)
            moving = gif_summary(f"{name}/clips", grid(clips, rows, columns), fps)
            self.writer.file_writer.add_summary(moving, step)

        self._try(write)

    def _try(self, write):
        if self.writer is None:
            return
        try:
            write()
            self.writer.flush()
        except OSError as error:
            self.say(f"warning: could not write TensorBoard's events: {error}; they end here")
            self.writer = None

    def close(self):
        if self.writer is not None:
            self.writer.close()


def events_of(folder):
    """{step: {name: value}} of the events in a folder, without those that were taken back."""
    values = {}
    for file in sorted(folder.glob("events*")):
        for event in small_events(file):
            if event.HasField("session_log"):
                values = {step: of for step, of in values.items() if step < event.step}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    values.setdefault(event.step, {})[value.tag] = value.simple_value
    return values


def small_events(path):
    """Yields the events in a file, but for pictures: their bytes, gigabytes in a long run, are not
    read. A record is the length of its data, a checksum of that, the data, and a checksum of them.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    # Where it is damaged, what follows is as if it was not there.
    with suppress(DecodeError, OSError, OverflowError), open(path, "rb") as file:
        while len(head := file.read(12)) == 12:
            size = int.from_bytes(head[:8], "little")
            if size > LARGE:
                file.seek(size + 4, os.SEEK_CUR)
            elif len(data := file.read(size + 4)) == size + 4:
                yield Event.FromString(data[:size])


def agreement(lines, events, done):
    """Up to which step, `done` at most, the lines of stats.jsonl and the events agree."""
    expected = {line["frames"]: _values(line) for line in lines}
    for step in sorted(expected.keys() | events.keys()):
        told, there = expected.get(step, {}), events.get(step, {})
        same = told.keys() == there.keys()
        same = same and all(math.isclose(told[name], there[name], rel_tol=1e-6) for name in told)
        if step > done or not same:
            return step - 1
    return done


def _values(line):
    """What is shown of a line: its numbers. A mean without a finite value is NaN, and in the file
    null.
    """
    return {
        name: value
        for name, value in line.items()
        if name != "frames" and value is not None and value == value
    }


def gif_summary(name, frames, fps):
    """Frames uint8 [T, 3, H, W] as a summary that TensorBoard plays. PyTorch's add_video would need
    another package for it.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    first, *rest = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    with io.BytesIO() as file:
        milliseconds = max(20, round(1000 / fps))
        first.save(file, "GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)
        picture = Summary.Image(
            height=first.height,
            width=first.width,
            colorspace=3,
            encoded_image_string=file.getvalue(),
        )
    return Summary(value=[Summary.Value(tag=name, image=picture)])
