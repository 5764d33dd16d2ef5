"""What a training leaves on disk for who watches it: losses and fidelity as CSV, TensorBoard events, and one line."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

from ..errors import ZeroConvError
from ..files.writing import replacing
from .convergence import Average

if TYPE_CHECKING:
    import numpy as np

    from .loop import Progress

logger = logging.getLogger(__name__)

LOSSES = ("step", "loss", "smoothed", "learning_rate", "gradient_norm", "seconds")
FIDELITY = ("step", "fidelity", "converged")
VALIDATION = ("step", "loss")
HELD_OUT = "validation.csv"
OPTIONS = "options.json"
RECENT = 100
"""The steps whose pace tells how long the rest will take."""


class LogError(ZeroConvError, RuntimeError):
    """A log that cannot be written or gone on with; the message names the file and what to do."""


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Within it, what cannot be written of a log in `folder` becomes a LogError that says what to do."""
    try:
        yield
    except OSError as error:
        raise LogError(
            f"the log in {folder} cannot be written: {error}. Make room there, or choose a folder that can be written "
            "to; training goes on from its last checkpoint"
        ) from error


class Log:
    """The log of one run: `losses.csv`, `fidelity.csv`, `validation.csv` and, where it is installed, `tensorboard/`.

    losses.csv has a row for each optimizer step, fidelity.csv one for each measurement, its column `converged` filled
    from the row on in which the jump was confirmed, and validation.csv the loss of the held-out pictures, where there
    is one. Numbers have all their digits, so that losses can be compared bit for bit, and each row is on its way to the
    disk when `add` returns. `losses`, `fidelity` and `validation` are (step, value).
    """

    def __init__(
        self, losses: Table, fidelity: Table, validation: Table | None, events: Any, trackers: Sequence[Any] = ()
    ):
        self._losses, self._fidelity, self._validation, self._events = losses, fidelity, validation, events
        self._trackers = list(trackers)
        self._average = Average()
        self._clock: deque[float] = deque(maxlen=RECENT + 1)
        self.losses: list[tuple[int, float]] = []
        self.fidelity: list[tuple[int, float]] = []
        for row in losses.rows:
            self.losses.append((int(row[0]), float(row[1])))
            self._average.add(float(row[1]))
        self.fidelity += [(int(row[0]), float(row[1])) for row in fidelity.rows]
        self.validation = [(int(row[0]), float(row[1])) for row in (validation.rows if validation else ())]

    @classmethod
    def open(
        cls,
        folder: Path,
        step: int = 0,
        options: Mapping[str, object] | None = None,
        trackers: Sequence[str] = (),
    ) -> Log:
        """The log in `folder` of a training that goes on after `step`; 0 for one that begins, with nothing before it.

        Rows beyond `step` were written by a run that was cut off after its last checkpoint: they are cut away, as is a
        row half written. The others stay as they are, byte for byte. `options` are written to OPTIONS, and shown by
        TensorBoard and by `trackers`, names of what accelerate tells of it too, such as wandb; those of RESUMED go on
        with the run that they have of this folder.
        Raises LogError where the files cannot be written or are not such a log, or a tracker cannot be had.
        """
        step = step if step > 0 else -1  # a training that begins measures step 0 itself
        with written_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            tables = [Table(folder / name, columns, step) for name, columns in _FILES.items()]
            held_out = folder / HELD_OUT
            validation = Table(held_out, VALIDATION, step) if held_out.exists() else None
            run_id = _run_id(folder, step) if trackers else ""
            if options:
                with replacing(folder / OPTIONS) as temporary:
                    temporary.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8", newline="\n")
        started = [_tracker(name, options or {}, run_id) for name in trackers]
        return cls(tables[0], tables[1], validation, _events(folder / "tensorboard", step, options or {}), started)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what TensorBoard still has in memory, and close the files."""
        self._losses.close()
        self._fidelity.close()
        if self._validation is not None:
            self._validation.close()
        if self._events is not None:
            self._events.close()
        self._tell(lambda tracker: tracker.finish())

    def add(self, progress: Progress, picture: np.ndarray | None = None) -> None:
        """Log what `train` yields; `picture` (H,W,3) uint8 shows its samples, for TensorBoard.

        Raises LogError when the disk is full, and for a step that does not follow the last one.
        """
        step, scalars = progress.step, dict[str, float]()
        with written_to(self._losses.path.parent):
            if progress.loss is not None:
                smoothed = self._average.add(progress.loss)
                norm, seconds = progress.gradient_norm, progress.seconds
                self._losses.add((step, progress.loss, smoothed, progress.learning_rate, norm, seconds))
                self.losses.append((step, progress.loss))
                scalars |= {"loss": progress.loss, "loss_smoothed": smoothed, "learning_rate": progress.learning_rate}
                scalars |= {} if norm is None else {"gradient_norm": norm}
            if progress.fidelity is not None:
                self._fidelity.add((step, progress.fidelity, progress.converged))
                self.fidelity.append((step, progress.fidelity))
                scalars["fidelity"] = progress.fidelity
            if progress.validation is not None:
                if self._validation is None:
                    self._validation = Table(self._losses.path.with_name(HELD_OUT), VALIDATION, -1)
                self._validation.add((step, progress.validation))
                self.validation.append((step, progress.validation))
                scalars["validation_loss"] = progress.validation
            self._clock.append(progress.seconds)
            if self._events is not None:
                for name, value in scalars.items():
                    self._events.add_scalar(name, value, step)
                if picture is not None:
                    self._events.add_image("samples", picture, step, dataformats="HWC")
        self._tell(lambda tracker: tracker.log(scalars, step=step))
        if picture is not None:
            self._tell(lambda tracker: getattr(tracker, "log_images", _nothing)({"samples": [picture]}, step=step))

    def _tell(self, what: Callable[[Any], Any]) -> None:
        """Tell the trackers; one that cannot be told is no reason to end a training, and is left alone from then on."""
        for tracker in list(self._trackers):
            try:
                what(tracker)
            except Exception as error:  # noqa: BLE001  (each has errors of its own)
                logger.warning("%s is no longer told of this training: %s", tracker.name, error)
                self._trackers.remove(tracker)

    @property
    def smoothed(self) -> float | None:
        """The loss's running average (`convergence.Average`); None before the first step."""
        return self._average.value

    def remaining(self, progress: Progress) -> float | None:
        """Seconds that are left, sampling and saving too (`remaining`); None until the pace is known."""
        steps = remaining(self._clock, progress.steps - progress.step)
        return None if steps is None else steps + progress.pauses

    def describe(self, progress: Progress) -> str:
        """`describe` with what this log knows."""
        return describe(progress, self.smoothed, remaining(self._clock, 1))


def remaining(clock: Sequence[float], steps: int) -> float | None:
    """How long `steps` more steps take, in seconds; None before the second reading.

    `clock` holds a reading after each of the last steps. Single long steps (a pause, a measurement, a machine that
    slept) count as three usual ones at most, while buckets of different sizes keep their mean.
    """
    readings = list(clock)
    took = [b - a for a, b in pairwise(readings)]
    if not took:
        return None
    usual = median(took)
    return steps * sum(min(each, 3 * usual) for each in took) / len(took)


def describe(progress: Progress, smoothed: float | None = None, pace: float | None = None) -> str:
    """One line for the node and the terminal: step, loss, fidelity, pace, time left and memory, as far as known.

    "step 1200/5000 | loss 0.1234 (smoothed 0.1301) | 3.1 steps/s | 20 min left | 9.8 GiB". `pace` is in seconds for
    one step; what is left counts sampling and saving too.
    """
    says = [f"step {progress.step}/{progress.steps}"]
    if progress.loss is not None:
        says.append(f"loss {progress.loss:.4f}" + (f" (smoothed {smoothed:.4f})" if smoothed is not None else ""))
    if progress.fidelity is not None:
        says.append(f"fidelity {progress.fidelity:.3f}" + _beside_the_best(progress))
    if progress.validation is not None:
        says.append(f"held-out loss {progress.validation:.4f}")
    if progress.converged is not None:
        says.append(f"converged at step {progress.converged}")
    if pace:
        says.append(f"{1 / pace:.1f} steps/s" if pace < 1 else f"{pace:.1f} s/step")
        if progress.step < progress.steps:
            says.append(f"{duration(pace * (progress.steps - progress.step) + progress.pauses)} left")
    if progress.memory is not None:
        says.append(f"{progress.memory / 2**30:.1f} GiB")
    return " | ".join(says)


def _beside_the_best(progress: Progress) -> str:
    """How the fidelity of this step stands beside the best one; nothing where it is the best itself."""
    if progress.best is None or progress.best[0] == progress.step:
        return ""
    step, fidelity = progress.best
    if progress.fallen:
        return f" (has fallen from {fidelity:.3f} at step {step}: stop and take the best control, or learn more slowly)"
    return f" (best {fidelity:.3f} at step {step})"


def duration(seconds: float) -> str:
    """A time in its two largest units: "45 s", "20 min", "3 h 5 min", "2 d 4 h"."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(hours + minutes / 60), 24)
    return f"{days} d {hours} h"


# -- files ------------------------------------------------------------------------------------------------------------


_FILES = {"losses.csv": LOSSES, "fidelity.csv": FIDELITY}


class Table:
    """A CSV file that grows by rows, each with a higher step; lines end in a newline alone on every system."""

    def __init__(self, path: Path, columns: Sequence[str], step: int):
        """Keep the rows up to `step` of the file at `path`; raises LogError for a file with other columns."""
        self.path = path
        self.rows = self._cut(",".join(columns), step)
        self._last = int(self.rows[-1][0]) if self.rows else -1
        self._file: IO[str] = path.open("a", encoding="utf-8", newline="")

    def _cut(self, header: str, step: int) -> list[list[str]]:
        found = self.path.read_bytes() if self.path.exists() else b""
        lines = found.decode("utf-8", "replace").split("\n")[:-1]  # behind the last newline is what a kill left half
        if lines and lines[0] != header:
            raise LogError(
                f"{self.path} is no log of a training: its first line is {lines[0][:80]!r}, expected {header!r}: move "
                "it away, or train in another folder"
            )
        rows: list[list[str]] = []
        for line in lines[1:]:
            row = line.split(",")
            # What a power cut leaves may be anything; from there on nothing can be trusted.
            if len(row) != header.count(",") + 1 or not row[0].isdigit() or int(row[0]) > step:
                break
            rows.append(row)
        kept = "".join(f"{line}\n" for line in (header, *(",".join(row) for row in rows))).encode()
        if kept != found:
            with replacing(self.path) as temporary:
                temporary.write_bytes(kept)
        return rows

    def add(self, values: Sequence[float | None]) -> None:
        """Append a row, None as an empty field."""
        step = int(values[0] or 0)
        if step <= self._last:
            raise LogError(
                f"{self.path} ends with step {self._last}, and step {step} comes after it: open the log again at the "
                "step that training goes on from"
            )
        self._file.write(",".join(map(_digits, values)) + "\n")
        self._file.flush()
        self._last = step

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _digits(value: float | None) -> str:
    """A number with all its digits; a numpy one is written as Python's."""
    return "" if value is None else repr(value if isinstance(value, int) else float(value))


def _events(folder: Path, step: int, options: Mapping[str, object]) -> Any:
    """A TensorBoard writer whose events replace those beyond `step`; None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("TensorBoard is not installed: losses and fidelity are in the run's CSV files alone")
        return None
    writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)
    if options:
        writer.add_text("options", _table(options.items()), step + 1)
    return writer


RUN_ID = "run_id.txt"
"""In a run's folder: what trackers know it by."""

RESUMED: dict[str, Callable[[str], dict[str, str]]] = {"wandb": lambda run_id: {"id": run_id, "resume": "allow"}}
"""How trackers are told to go on with a run; others begin a new one each time."""


def _run_id(folder: Path, step: int) -> str:
    """What trackers know the run in `folder` by, which goes on after `step`; a new one for one that begins."""
    path = folder / RUN_ID
    if step < 0 or not path.is_file():
        with replacing(path) as temporary:
            temporary.write_text(uuid4().hex, encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _tracker(name: str, options: Mapping[str, object], run_id: str) -> Any:
    """One of accelerate's trackers, started in the project zeroconv; raises LogError where it cannot be."""
    try:
        from accelerate import PartialState  # type: ignore[import-not-found]
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # type: ignore[import-not-found]
    except ImportError as error:
        raise LogError(f"tracker {name} is reached through accelerate, which is not installed: install it") from error
    known = {each: kind for each, kind in LOGGER_TYPE_TO_CLASS.items() if not kind.requires_logging_directory}
    if name not in known:
        raise LogError(
            f"there is no tracker {name!r}: choose of {', '.join(known)}; TensorBoard needs no mention, only to be "
            "installed"
        )
    try:
        PartialState()  # its own log asks for it; it takes the processes as they are
        tracker = known[name]("zeroconv", **(RESUMED[name](run_id) if name in RESUMED else {}))
        tracker.start()
        tracker.store_init_configuration(dict(options))
    except Exception as error:
        raise LogError(
            f"tracker {name} cannot be started ({error}): install it, log in to it, or leave it out"
        ) from error
    return tracker


def _nothing(*_: Any, step: int) -> None:
    """In place of what some trackers do not do."""


def _table(rows: Iterable[tuple[str, object]]) -> str:
    return "\n".join(["| option | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
