"""What an evaluation leaves behind: NeMo-style lines, a summary that proves them whole, a table for people."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from graft.evaluation.evaluate import Evaluation, beside
from graft.evaluation.report import summary_table, worst_utterances, write_evaluation

SUMMARY = {
    "wer": 0.125,
    "wer_interval_95": [0.0625, 0.1875],
    "cer": 0.03,
    "normalizer": "basic",
    "substitutions": 3,
    "deletions": 1,
    "insertions": 0,
    "num_words": 32,
    "num_utterances": 3,
    "empty_hypotheses": 0,
    "unfinished_hypotheses": 2,
    "seconds": 2.0,
    "audio_seconds": 9.0,
    "audio_seconds_per_second": 4.5,
    "loss": 0.5,
}


def line(number: int, text: str, hypothesis: str, wer: float) -> dict:
    return {"id": f"u{number}", "duration": 1.5, "text": text, "pred_text": hypothesis, "wer": wer, "cer": 0.0}


@pytest.fixture
def evaluation() -> Evaluation:
    lines = [line(0, "ein Öl", "ein Öl", 0.0), line(1, "a b c", "a x c", 0.3333), line(2, "d", "e f", 2.0)]
    return Evaluation(dict(SUMMARY), lines)


def shown(what: RenderableType) -> str:
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_lines_are_nemos(evaluation: Evaluation, tmp_path: Path) -> None:
    write_evaluation(tmp_path / "eval" / "test", evaluation, {"u0": "audio/u0.flac"})
    text = (tmp_path / "eval" / "test" / "hypotheses.jsonl").read_text(encoding="utf-8")
    first, second, third = map(json.loads, text.splitlines())
    assert first == {"audio_filepath": "audio/u0.flac", **evaluation.lines[0]}
    assert list(first)[:5] == ["audio_filepath", "id", "duration", "text", "pred_text"]
    assert "audio_filepath" not in second and third["wer"] == 2.0
    assert "Öl" in text, "text that people read is not escaped"


def test_the_summary_is_what_was_measured(evaluation: Evaluation, tmp_path: Path) -> None:
    write_evaluation(tmp_path, evaluation)
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY


def test_an_old_summary_does_not_stand_beside_new_lines(
    evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_evaluation(tmp_path, evaluation)

    def full_disk(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("graft.evaluation.report.write_whole", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_evaluation(tmp_path, evaluation)
    assert not (tmp_path / "summary.json").exists()


def test_the_table_has_the_numbers_and_what_is_odd(evaluation: Evaluation) -> None:
    text = shown(summary_table(SUMMARY, "test: a checkpoint"))
    for expected in ("test: a checkpoint", "12.50%", "6.25%", "18.75%", "3 substitutions", "32 words", "basic"):
        assert expected in text
    assert "3, 2 cut off at max_new_tokens" in text
    assert "empty" not in text and "rejected" not in text and "swapped" not in text
    more = SUMMARY | {
        "wer_swapped": 0.9,
        "listens": True,
        "loss_swapped": 3.25,
        "num_rejects": 7,
        "wer_encoder_base": 0.5,
    }
    text = shown(summary_table(more, "test"))
    for expected in ("90.00%", "3.2500", "7 rejected", "50.00%"):
        assert expected in text


def test_the_worst_come_first_and_right_ones_not_at_all(evaluation: Evaluation) -> None:
    text = shown(worst_utterances(evaluation, 5))
    assert text.index("u2  WER 200%") < text.index("u1  WER 33%")
    assert "u0" not in text
    assert "REF: a b c" in text and "HYP: a x c" in text
    assert "u1" not in shown(worst_utterances(evaluation, 1))


def test_two_evaluations_beside_each_other(evaluation: Evaluation) -> None:
    other = Evaluation(SUMMARY | {"wer": 0.75, "loss": None}, [line(2, "d", "q", 1.0), line(9, "z", "z", 0.0)])
    both = beside(evaluation, other, "encoder_base")
    assert both.summary["wer"] == 0.125 and both.summary["wer_encoder_base"] == 0.75
    assert "loss_encoder_base" not in both.summary
    assert [each.get("pred_text_encoder_base") for each in both.lines] == [None, None, "q"]


def test_curves_and_rows(evaluation: Evaluation) -> None:
    assert evaluation.tags() == {"eval/loss": 0.5, "eval/wer": 0.125, "eval/cer": 0.03}
    rows = evaluation.rows(2)
    assert [row["id"] for row in rows] == ["u0", "u1"]
    assert rows[1] == {"id": "u1", "reference": "a b c", "hypothesis": "a x c", "wer": 0.3333}
