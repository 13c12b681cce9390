"""The live line of a run on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class ProgressLine:
    """Model and stage, bar over samples, images/s, loss, time to go."""

    def __init__(self, title: str, total_samples: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]} images/s  loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(title, total=total_samples, speed="-", loss="-")
        self._progress.start()

    def update(self, samples_seen: int, images_per_second: float | None, loss: float | None) -> None:
        fields = {
            "speed": "-" if images_per_second is None else f"{images_per_second:.0f}",
            "loss": "-" if loss is None else f"{loss:.3f}",
        }
        self._progress.update(self._task, completed=samples_seen, **fields)  # type: ignore[arg-type]

    def close(self) -> None:
        self._progress.stop()
