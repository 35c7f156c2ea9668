"""An evaluation as files for programs and as a table for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from graft.evaluation.evaluate import Evaluation
from graft.evaluation.wer import alignment
from graft.run_dir import write_whole

SUMMARY_FILE, HYPOTHESES_FILE = "summary.json", "hypotheses.jsonl"


def write_evaluation(folder: str | Path, evaluation: Evaluation, audio_files: Mapping[str, str] | None = None) -> None:
    """Write ``summary.json`` and ``hypotheses.jsonl`` into ``folder``; the summary last, so it proves both whole.

    Args:
        audio_files: path by utterance id, where known; NeMo's Speech Data Explorer plays them.
    """
    folder = Path(folder)
    known = audio_files or {}
    lines = [({"audio_filepath": known[line["id"]]} if line["id"] in known else {}) | line for line in evaluation.lines]
    (folder / SUMMARY_FILE).unlink(missing_ok=True)
    write_whole(folder / HYPOTHESES_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_whole(folder / SUMMARY_FILE, json.dumps(evaluation.summary, indent=2, ensure_ascii=False) + "\n")


def summary_table(summary: Mapping[str, Any], title: str) -> Table:
    """The numbers that people look at first, one row each; the interval is :func:`confidence_interval`'s."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _rows(summary):
        table.add_row(name, value)
    return table


def worst_utterances(evaluation: Evaluation, most: int) -> RenderableType:
    """Alignments of the utterances with the most errors per word, worst first; only those with errors."""
    wrong = sorted((line for line in evaluation.lines if line["wer"] > 0), key=lambda line: -line["wer"])
    parts = []
    for line in wrong[:most]:
        parts.append(Text(f"{line['id']}  WER {line['wer']:.0%}", style="bold"))
        parts.append(Text(alignment(line["text"], line["pred_text"], evaluation.summary["normalizer"]) + "\n"))
    return Group(*parts)


def _rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    low, high = summary["wer_interval_95"]
    rows = [
        ("WER", f"{summary['wer']:.2%}   (95 %: {low:.2%} to {high:.2%})"),
        ("  errors", _errors(summary)),
        ("CER", f"{summary['cer']:.2%}"),
    ]
    if "wer_swapped" in summary:
        deaf = "hardly worse than with the right audio: it does not listen"
        verdict = "another utterance's" if summary["listens"] else deaf
        rows.append(("WER, swapped audio", f"{summary['wer_swapped']:.2%}   ({verdict})"))
    if "wer_encoder_base" in summary:
        rows.append(("WER, base Whisper", f"{summary['wer_encoder_base']:.2%}   (its own decoder, same utterances)"))
    if summary.get("loss") is not None:
        swapped = summary.get("loss_swapped")
        told = "" if swapped is None else f"   (swapped audio {swapped:.4f})"
        rows.append(("loss per token", f"{summary['loss']:.4f}{told}"))
    rows += [
        ("normalizer", summary["normalizer"]),
        ("utterances", _utterances(summary)),
        ("speed", _speed(summary)),
    ]
    return rows


def _errors(summary: Mapping[str, Any]) -> str:
    kinds = [f"{summary[kind]} {kind}" for kind in ("substitutions", "deletions", "insertions")]
    return f"{', '.join(kinds)} in {summary['num_words']} words"


def _utterances(summary: Mapping[str, Any]) -> str:
    odd = {
        "rejected": summary.get("num_rejects", 0),
        "with an empty hypothesis": summary["empty_hypotheses"],
        "cut off at max_new_tokens": summary["unfinished_hypotheses"],
    }
    return ", ".join([str(summary["num_utterances"]), *(f"{count} {what}" for what, count in odd.items() if count)])


def _speed(summary: Mapping[str, Any]) -> str:
    return (
        f"{summary['audio_seconds']:.0f} s of audio in {summary['seconds']:.1f} s: "
        f"{summary['audio_seconds_per_second']:.1f} times as fast as it is spoken"
    )
