"""What a run shows while it goes on: a bar on a terminal, plain lines elsewhere."""

import sys
import time

from tqdm import tqdm

_LINE_EVERY_S = 30.0
_BAR_EVERY_S = 0.5


class ProgressReporter:
    """Losses, codes used and the time left.

    Args:
        progress: share of the run that is already done, 0 to 1.
        silent: say nothing: another process does.
    """

    def __init__(self, progress: float, *, silent: bool = False) -> None:
        self._silent = silent
        self._bar = tqdm(
            total=1.0,
            initial=progress,
            disable=silent or None,  # None: where stderr is no terminal
            bar_format="{percentage:3.0f}%|{bar}| {postfix[0]}",
            postfix=[""],
            dynamic_ncols=True,
        )
        self._every_s = _LINE_EVERY_S if self._bar.disable else _BAR_EVERY_S
        self._start = (time.monotonic(), progress)
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to show something: reading the figures may mean waiting for the device."""
        return not self._silent and time.monotonic() - self._last >= self._every_s

    def show(self, progress: float, losses: tuple[float, float], codes_used: int) -> None:
        """Show where the run is."""
        self._last = time.monotonic()
        start_time, start_progress = self._start
        done = progress - start_progress
        left_s = (self._last - start_time) * (1 - progress) / done if done > 0 else 0.0
        text = (
            f"reconstruction {losses[0]:.4f}  codebook {losses[1]:.4f}  codes used {codes_used}  "
            f"{int(left_s // 60)}:{int(left_s % 60):02d} left"
        )
        if self._bar.disable:
            print(f"{progress:4.0%}  {text}", file=sys.stderr, flush=True)
        else:
            self._bar.postfix[0] = text
            self._bar.update(progress - self._bar.n)

    def line(self, text: str) -> None:
        """A line of its own, to stdout."""
        if not self._silent:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """A line of its own, to stderr."""
        if not self._silent:
            self._bar.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.close()
