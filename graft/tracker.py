"""What a run measures: TensorBoard for the eye and ``metrics.jsonl`` for programs, written by rank 0 alone.

The other ranks hold a :class:`NullTracker`, so nobody asks ``if rank == 0``.

``metrics.jsonl`` has one object per call: ``{"step": 20, "time": 12.3, "train/loss": 0.4}``; ``time`` is seconds since
the run began, not counting the pauses between a stop and a resume. A value that is not finite is ``null`` there.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from graft.ranks import Ranks
from graft.run_dir import naming, write_whole

METRICS_FILE, UTTERANCES_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "utterances.jsonl", "tensorboard"
FLUSH_S = 10  # a browser that watches the run is this far behind
# The "custom scalars" page: curves that only mean something beside each other.
LAYOUT = {
    "Learning": {
        "loss": ["Multiline", ["train/loss", "eval/loss", "eval/loss_swapped"]],
        "word error rate (right and swapped audio)": ["Multiline", ["eval/wer", "eval/wer_swapped"]],
        "character error rate": ["Multiline", ["eval/cer"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
    },
    "Speed": {
        "audio seconds per second": ["Multiline", ["train/audio_seconds_per_second"]],
        "tokens per second": ["Multiline", ["train/tokens_per_second"]],
        "model FLOP utilisation": ["Multiline", ["train/mfu"]],
        "lost": ["Multiline", ["train/padding", "train/data_wait"]],
    },
}


class NullTracker:
    """Takes everything a :class:`Tracker` takes, and does nothing."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers by tag."""

    def utterances(self, step: int, ids: Sequence[str]) -> None:
        """The utterances of a step, over all ranks."""

    def text(self, step: int, tag: str, markdown: str) -> None:
        """A piece of Markdown."""

    def table(self, step: int, tag: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Rows of the same keys, as a table."""

    def audio(self, step: int, tag: str, waveform: np.ndarray | torch.Tensor, sample_rate: int) -> None:
        """A mono waveform (S,) to listen to; samples beyond [-1, 1] are clipped."""

    def hparams(self, settings: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """The settings of the run, and the tags of the scalars to compare runs by; nested settings become ``a.b``."""

    def close(self) -> None:
        """Everything is on disk afterwards."""


class Tracker(NullTracker):
    """Writes ``<run_dir>/metrics.jsonl`` and ``<run_dir>/tensorboard``.

    Args:
        resume_step: the first step that will be logged: what is there from it on is taken away, so that no step
            stands twice. None: a run that begins, and nothing of an earlier start stays. Whose folder it is was
            settled before.

    Raises:
        ValueError: if ``metrics.jsonl`` is damaged.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        metrics, utterances = run_dir / METRICS_FILE, run_dir / UTTERANCES_FILE
        first_step = resume_step or 0
        self._began = time.monotonic() - _cut(metrics, first_step)
        _cut(utterances, first_step)
        self._metrics = metrics.open("a", encoding="utf-8")
        self._utterances = utterances.open("a", encoding="utf-8")
        self._folder = run_dir / TENSORBOARD_FOLDER
        with naming(self._folder):  # its thread writes, and the next call raises what has befallen it
            self._board = SummaryWriter(str(self._folder), purge_step=first_step, flush_secs=FLUSH_S)
            self._board.add_custom_scalars(LAYOUT)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers by tag; 0-dimensional tensors and NumPy numbers are numbers too.

        Raises:
            TypeError: if one is not a number; nothing of the call is written then.
        """
        numbers = {tag: _number(tag, value, step) for tag, value in values.items()}
        shown = {tag: number if math.isfinite(number) else None for tag, number in numbers.items()}
        self._write(self._metrics, step, shown)
        with naming(self._folder):
            for tag, number in numbers.items():
                self._board.add_scalar(tag, number, step)

    def utterances(self, step: int, ids: Sequence[str]) -> None:
        """The utterances of a step, over all ranks: ``{"step": 3, "ids": [...]}`` in ``utterances.jsonl``."""
        self._write(self._utterances, step, {"ids": list(ids)})

    def text(self, step: int, tag: str, markdown: str) -> None:
        """A piece of Markdown."""
        self._board.add_text(tag, markdown, step)

    def table(self, step: int, tag: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Rows of the same keys, as a table."""
        self.text(step, tag, markdown_table(rows))

    def audio(self, step: int, tag: str, waveform: np.ndarray | torch.Tensor, sample_rate: int) -> None:
        """A mono waveform (S,) to listen to; samples beyond [-1, 1] are clipped."""
        samples = torch.as_tensor(waveform).detach().float().cpu()
        assert samples.ndim == 1, f"audio {tag} has shape {tuple(samples.shape)}, expected a mono waveform (S,)"
        self._board.add_audio(tag, samples.clamp(-1, 1).unsqueeze(0), step, sample_rate)

    def hparams(self, settings: Mapping[str, Any], metrics: Iterable[str]) -> None:
        """The settings of the run, and the tags of the scalars to compare runs by; nested settings become ``a.b``.

        ``SummaryWriter.add_hparams`` would also log a point of every metric, in a folder of its own; these refer to
        the curves that are there.
        """
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(_flat(settings), dict.fromkeys(metrics, 0.0)):
            self._board.file_writer.add_summary(summary)

    def close(self) -> None:
        """Everything is on disk afterwards."""
        self._metrics.close()
        self._utterances.close()
        with naming(self._folder):
            self._board.close()

    def _write(self, file: TextIO, step: int, what: Mapping[str, Any]) -> None:
        line = {"step": step, "time": round(time.monotonic() - self._began, 3), **what}
        with naming(Path(file.name)):
            file.write(json.dumps(line) + "\n")
            file.flush()


def tracker_for(ranks: Ranks, run_dir: str | Path, resume_step: int | None = None) -> NullTracker:
    """The tracker of this rank. Every rank must call: all of them raise when rank 0 cannot write.

    Raises:
        ValueError: as :class:`Tracker`.
    """
    return ranks.by_first(lambda: Tracker(run_dir, resume_step)) or NullTracker()


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table whose columns are the keys of the first row."""
    if not rows:
        return "(no rows)"
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _number(tag: str, value: Any, step: int) -> float:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{tag} at step {step} is {value!r}, a {type(value).__name__}: a single number was expected")
    return value


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; what TensorBoard's table cannot hold is spelled out."""
    flat: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def _cut(path: Path, step: int) -> float:
    """Take away the lines from ``step`` on, whole or not at all; the time of the last line that stays."""
    kept = [line for line in _lines(path) if line["step"] < step]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
    return float(kept[-1]["time"]) if kept else 0.0


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            lines.append({"step": int(line.pop("step")), "time": float(line.pop("time")), **line})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number < len(texts):  # what follows the last newline is empty, or a line that a killed run began
                raise ValueError(f"{path}:{number} is not a line of metrics: {text[:80]!r}") from error
    return lines
