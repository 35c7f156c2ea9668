"""Scores are those of the whole split on every rank, a deaf model is found out, and the command does what it says."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tiny_bases import tokenizer
from tiny_run import BEST_STEP, TEXTS, tiny_run
from torch import nn

from graft.data.prompt import PromptTemplate
from graft.evaluation.evaluate import Evaluation, can_be_swapped, evaluate, gathered, score_transcriber, spread
from graft.evaluation.transcribe import Answers, Hypothesis
from graft.evaluation.wer import score
from graft.model.processor import CHAT_TEMPLATE
from graft.ranks import AgreedValueError, Ranks
from graft.recipe import Evaluation as Settings

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = Settings(batch_size=2, max_new_tokens=40)


@dataclass(frozen=True)
class Entry:
    id: str
    text: str
    num_frames: int
    duration: float = 2.0
    instruction: str | None = None


class Source:
    """Features that say which text they are: (F, 1), filled with its number."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.entries = [Entry(f"u{i}", text, 3 + i % 5) for i, text in enumerate(texts)]

    def read_many(self, indices: Sequence[int]) -> list[torch.Tensor]:
        return [torch.full((self.entries[i].num_frames, 1), float(i)).bfloat16() for i in indices]


class Listener(nn.Module):
    """Writes what the audio says; a ``deaf`` one writes what its batch's rows would say without listening."""

    def __init__(self, texts: Sequence[str], deaf: bool = False) -> None:
        super().__init__()
        self.texts, self.deaf, self.generation_config = texts, deaf, SimpleNamespace(eos_token_id=258)

    def generate(self, input_ids: torch.Tensor, audio_features: torch.Tensor, **_: Any) -> torch.Tensor:
        heard = [self.texts[0 if self.deaf else int(features[0, 0])] for features in audio_features]
        replies = [list(TOKENS(text)["input_ids"]) + [258] for text in heard]
        longest = max(map(len, replies))
        padded = torch.tensor([reply + [256] * (longest - len(reply)) for reply in replies])
        return torch.cat([input_ids, padded], dim=1)

    def forward(self, labels: torch.Tensor, audio_features: torch.Tensor, num_items_in_batch: int, **_: Any) -> Any:
        assert num_items_in_batch == 1
        return SimpleNamespace(loss=0.25 * (labels != -100).sum() + (audio_features[:, 0, 0] >= 0).sum())


TOKENS = tokenizer()


@pytest.fixture(scope="module")
def template() -> PromptTemplate:
    tokens = tokenizer()
    tokens.add_special_tokens({"additional_special_tokens": ["<|audio_start|>", "<|audio_pad|>", "<|audio_end|>"]})
    tokens.chat_template = CHAT_TEMPLATE
    processor = SimpleNamespace(
        tokenizer=tokens,
        audio_token="<|audio_pad|>",
        stack_factor=4,
        apply_chat_template=lambda messages, **options: tokens.apply_chat_template(messages, **options),
    )
    return PromptTemplate.from_processor(processor, "Be brief.", "Transcribe.")


WORDS = ["red fox", "blue whale", "grey wolf", "red fox", "black swan", "white bear", "brown owl"]


def evaluated(texts: Sequence[str], template: PromptTemplate, deaf: bool = False, **options: Any) -> Evaluation:
    model = Listener(texts, deaf)
    given = {"settings": SETTINGS, "device": "cpu", "precision": "fp32", **options}
    return evaluate(model, Source(texts), template, Ranks(), **given)


def test_a_model_that_listens(template: PromptTemplate) -> None:
    evaluation = evaluated(WORDS, template)
    summary = evaluation.summary
    assert (summary["wer"], summary["cer"], summary["hits"], summary["num_words"]) == (0, 0, 14, 14)
    assert summary["wer_swapped"] == 1, "every text has other words"
    assert summary["listens"]
    assert (summary["empty_hypotheses"], summary["unfinished_hypotheses"]) == (0, 0)
    assert [line["pred_text"] for line in evaluation.lines] == WORDS
    assert all(line["pred_text_swapped"] != line["text"] for line in evaluation.lines)


def test_a_deaf_model_is_found_out(template: PromptTemplate) -> None:
    summary = evaluated(WORDS, template, deaf=True).summary
    assert summary["wer_swapped"] == summary["wer"] == 10 / 14  # "red fox" is right twice, with any audio
    assert not summary["listens"]


def test_the_loss_is_per_label_token(template: PromptTemplate) -> None:
    summary = evaluated(WORDS, template).summary
    tokens = sum(len(text) + 1 for text in WORDS)
    assert summary["num_label_tokens"] == tokens
    assert summary["loss"] == pytest.approx(0.25 + len(WORDS) / tokens)


def test_curves_of_a_training_run(template: PromptTemplate) -> None:
    names = {f"eval/{name}" for name in ("loss", "wer", "cer", "wer_swapped", "loss_swapped")}
    assert set(evaluated(WORDS, template).tags()) == names
    assert set(evaluated(WORDS, template, swapped=False).tags()) == {"eval/loss", "eval/wer", "eval/cer"}


def test_some_of_the_split_evenly_chosen(template: PromptTemplate) -> None:
    evaluation = evaluated(WORDS, template, max_utterances=3)
    assert [line["id"] for line in evaluation.lines] == ["u0", "u2", "u4"]
    assert [line["pred_text"] for line in evaluation.lines] == [WORDS[0], WORDS[2], WORDS[4]]
    assert evaluated(WORDS, template, max_utterances=99).summary["num_utterances"] == len(WORDS)


@pytest.mark.parametrize(("count", "most", "expected"), [(7, 3, [0, 2, 4]), (7, 7, list(range(7))), (2, 5, [0, 1])])
def test_spread(count: int, most: int, expected: list[int]) -> None:
    assert spread(count, most) == expected


def test_nothing_to_score(template: PromptTemplate) -> None:
    with pytest.raises(ValueError, match="no utterances"):
        evaluated([], template, swapped=False)


def test_one_text_only_cannot_show_listening(template: PromptTemplate) -> None:
    with pytest.raises(ValueError, match="1 distinct texts"):
        evaluated(["same", "Same."], template)
    assert evaluated(["same", "Same."], template, swapped=False).summary["wer"] == 0
    assert not can_be_swapped(Source(["same", "Same."]), SETTINGS, None)
    assert can_be_swapped(Source(["same", "other"]), SETTINGS, None)
    assert not can_be_swapped(Source(["same", "other"]), SETTINGS, 1)


@dataclass
class Meeting:
    """Where the ranks of one process meet."""

    world_size: int
    barrier: threading.Barrier = field(init=False)
    values: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.world_size, timeout=20)
        self.values = [None] * self.world_size


@dataclass(frozen=True)
class PlayedRanks(Ranks):
    """Ranks that are threads."""

    meeting: Meeting | None = None

    def gather(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        values = list(self.meeting.values)
        self.meeting.barrier.wait()
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]


def on_ranks(world_size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """The result or the exception of each rank."""
    meeting = Meeting(world_size)

    def one(rank: int) -> Any:
        try:
            return work(PlayedRanks(rank, world_size, rank, meeting))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(one, range(world_size)))


class Scripted:
    """Writes a fixed text per utterance; the utterance named ``broken`` cannot be read."""

    def __init__(self, hypotheses: Sequence[str], broken: int | None = None) -> None:
        self.entries, self.hypotheses, self.broken = Source(WORDS).entries, hypotheses, broken

    def read(self, indices: Sequence[int]) -> Sequence[int]:
        if self.broken in indices:
            raise ValueError(f"'{self.entries[self.broken].id}' is damaged")
        return indices

    def answer(self, batch: Sequence[int]) -> Answers:
        return Answers([self.hypotheses[i] for i in batch], [i != 3 for i in batch], 0.5 * len(batch), len(batch))


HYPOTHESES = ["red fax", "blue whale", "", "red red fox", "black", "white bear", "brown owl hoots"]


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_every_rank_has_the_scores_of_the_whole(world_size: int) -> None:
    scored = on_ranks(world_size, lambda ranks: score_transcriber(Scripted(HYPOTHESES), ranks, SETTINGS, label="x"))
    assert all(each == scored[0] for each in scored), scored
    summary = scored[0].summary
    errors = {kind: summary[kind] for kind in ("substitutions", "deletions", "insertions", "hits", "num_words")}
    assert errors == {"substitutions": 1, "deletions": 3, "insertions": 2, "hits": 10, "num_words": 14}
    assert summary["wer"] == 6 / 14
    assert (summary["loss"], summary["num_label_tokens"]) == (0.5, 7)
    assert (summary["empty_hypotheses"], summary["unfinished_hypotheses"]) == (1, 1)
    assert summary["num_ranks"] == world_size and summary["audio_seconds"] == 14
    assert [line["pred_text"] for line in scored[0].lines] == HYPOTHESES
    assert [line["wer"] for line in scored[0].lines] == [0.5, 0, 1, 0.5, 0.5, 0, 0.5]


def test_an_error_on_one_rank_ends_all_of_them() -> None:
    failed = on_ranks(3, lambda ranks: score_transcriber(Scripted(HYPOTHESES, broken=4), ranks, SETTINGS, label="x"))
    assert [type(error) for error in failed] == [AgreedValueError] * 3
    assert all("'u4' is damaged (rank" in str(error) for error in failed)


@pytest.mark.parametrize("indices", [[0, 1], [0, 1, 1], [0, 1, 2, 2], [1, 2, 3]])
def test_an_utterance_twice_or_not_at_all_is_noticed(indices: list[int]) -> None:
    with pytest.raises(AssertionError, match="3 utterances"):
        gathered([Hypothesis(index, "") for index in indices], 3, Ranks())


# The command


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """launch/evaluate.py as a module; it changes sys.path, which is put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("launch_evaluate", ROOT / "launch" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module


def parsed(command: ModuleType, *words: object) -> Namespace:
    return command.arguments_parser().parse_args([str(word) for word in words])


def results(folder: Path) -> tuple[dict, list[dict]]:
    lines = (folder / "hypotheses.jsonl").read_text().splitlines()
    return json.loads((folder / "summary.json").read_text()), [json.loads(line) for line in lines]


def test_a_run_means_its_best_checkpoint(command: ModuleType, run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    command.main(parsed(command, "--checkpoint", run_dir, "--split", "test"))
    summary, lines = results(run_dir / "eval" / "test")
    assert (summary["step"], summary["split"], summary["num_utterances"]) == (BEST_STEP, "test", len(TEXTS))
    assert summary["checkpoint"].endswith(f"step-{BEST_STEP:08d}") and summary["num_rejects"] == 0
    assert summary["precision"] == "fp32" and set(summary["versions"]) == {"torch", "transformers", "jiwer"}
    assert [(line["id"], line["text"]) for line in lines] == [(f"u{i}", text) for i, text in enumerate(TEXTS)]
    assert all(Path(line["audio_filepath"]).name == f"{line['id']}.flac" for line in lines)
    assert len({line["pred_text"] for line in lines}) > 1, "the model hears no difference, so this proves nothing"
    assert "wer_swapped" in summary and "WER, swapped audio" in capsys.readouterr().out


def test_a_checkpoint_means_itself(command: ModuleType, run_dir: Path, tmp_path: Path) -> None:
    losses = {}
    for step in (BEST_STEP, 6):
        checkpoint, output = run_dir / "checkpoints" / f"step-{step:08d}", tmp_path / str(step)
        words = ("--checkpoint", checkpoint, "--split", "test", "--output", output, "--no-swapped")
        command.main(parsed(command, *words, "evaluation.max_new_tokens=3"))
        summary, _ = results(output)
        assert summary["step"] == step and "wer_swapped" not in summary
        assert summary["max_new_tokens"] == 3, "words of the command line win over the run's recipe"
        losses[step] = summary["loss"]
    assert losses[BEST_STEP] != losses[6], "the trained projector is not used"


def test_a_manifest_with_rejects(command: ModuleType, run_dir: Path, tmp_path: Path) -> None:
    good = (run_dir.parent / "corpus" / "test.jsonl").read_text().splitlines()[:3]
    bad = [
        {"id": "gone", "audio_filepath": "gone.wav", "text": "x"},
        {"id": "mute", "audio_filepath": "u0.flac", "text": ""},
    ]
    manifest = run_dir.parent / "corpus" / "mine.jsonl"
    manifest.write_text("\n".join([*good, *map(json.dumps, bad)]))
    command.main(parsed(command, "--checkpoint", run_dir, "--manifest", manifest, "--output", tmp_path))
    summary, lines = results(tmp_path)
    assert (summary["num_utterances"], summary["num_rejects"], summary["split"]) == (3, 2, None)
    assert summary["manifest"] == str(manifest)
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["id"], reject["line"]) for reject in rejects] == [("gone", 4), ("mute", 5)]


def test_the_base_whisper_beside_the_graft_and_alone(command: ModuleType, run_dir: Path, tmp_path: Path) -> None:
    words = ("--split", "test", "--output")
    command.main(parsed(command, "--checkpoint", run_dir, "--base-whisper", *words, tmp_path / "both"))
    command.main(parsed(command, "--recipe", run_dir / "recipe.yaml", *words, tmp_path / "alone"))
    both, lines = results(tmp_path / "both")
    alone, base_lines = results(tmp_path / "alone")
    assert both["wer_encoder_base"] == alone["wer"]
    assert alone["base_whisper"].endswith("whisper") and alone["loss"] is None and "checkpoint" not in alone
    assert [line["pred_text_encoder_base"] for line in lines] == [line["pred_text"] for line in base_lines]
    assert len({line["pred_text"] for line in base_lines}) > 1, "the base Whisper says the same of everything"


@pytest.mark.parametrize("changed", ["a text", "an utterance"])
def test_both_are_scored_on_the_same_utterances(
    command: ModuleType, run_python: Callable, tmp_path: Path, changed: str
) -> None:
    """Silence has no features: it must not count as words that the base Whisper did not get."""
    run_dir = tiny_run(tmp_path)
    soundfile.write(tmp_path / "corpus" / "silence.flac", np.zeros(8_000), 16_000)
    manifest = tmp_path / "corpus" / "test.jsonl"
    lines = manifest.read_text().splitlines()
    silence = json.dumps({"id": "silence", "audio_filepath": "silence.flac", "duration": 0.5, "text": "not a word"})
    manifest.write_text("\n".join([silence, *lines]))
    run_python(
        ROOT / "shards" / "precompute.py", run_dir / "recipe.yaml", "data.features=shards", "audio.max_rejects=0.5"
    )
    words = ("--checkpoint", run_dir, "--base-whisper", "--split", "test", "data.features=shards", "--output")
    command.main(parsed(command, *words, tmp_path / "both"))
    both, _ = results(tmp_path / "both")
    command.main(parsed(command, "--recipe", run_dir / "recipe.yaml", "--split", "test", "--output", tmp_path / "all"))
    all_of_them, texts = results(tmp_path / "all")
    heard = score([u["text"] for u in texts[1:]], [u["pred_text"] for u in texts[1:]], "basic")
    assert (both["num_utterances"], both["num_rejects"]) == (len(TEXTS), 1)
    assert both["cer_encoder_base"] == heard.cer != all_of_them["cer"]

    rest = lines[1:] if changed == "an utterance" else [lines[0].replace("one", "1"), *lines[1:]]
    manifest.write_text("\n".join(rest))
    with pytest.raises(ValueError, match="1 of the 5 utterances whose features are scored .* such as 'u0'"):
        command.main(parsed(command, *words, tmp_path / "changed"))


def test_scores_of_something_else_are_not_written_over(command: ModuleType, run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "test.jsonl"
    other.write_text((run_dir.parent / "corpus" / "test.jsonl").read_text())
    words = ("--checkpoint", run_dir, "--no-swapped")
    for _ in range(2):
        command.main(parsed(command, *words, "--split", "test"))
    with pytest.raises(ValueError, match="eval/test holds the scores of test: .*--output"):
        command.main(parsed(command, *words, "--manifest", other))


def test_the_base_whisper_is_stock_whisper(command: ModuleType, run_dir: Path, tmp_path: Path) -> None:
    """One utterance by transformers' own parts."""
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

    base = run_dir.parent / "whisper"
    waveform, rate = soundfile.read(run_dir.parent / "corpus" / "u1.flac", dtype="float32")
    mel = WhisperFeatureExtractor.from_pretrained(base)(waveform, sampling_rate=rate, return_tensors="pt")
    tokens = WhisperForConditionalGeneration.from_pretrained(base).generate(mel["input_features"])
    expected = WhisperTokenizer.from_pretrained(base).decode(tokens[0], skip_special_tokens=True).strip()
    command.main(parsed(command, "--recipe", run_dir / "recipe.yaml", "--split", "test", "--output", tmp_path))
    _, lines = results(tmp_path)
    assert expected and lines[1]["pred_text"] == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "nowhere", "--split", "test"], "nowhere does not exist"),
        (["--checkpoint", "{run}/eval", "--split", "test"], "looked for"),
        (["--checkpoint", "{run}", "--split", "dev"], "no manifest for split 'dev'.*test"),
        (["--checkpoint", "{run}", "--manifest", "gone.jsonl"], "manifest gone.jsonl does not exist"),
        (["--checkpoint", "{run}", "--split", "test", "evaluation.beams=3"], "unknown key"),
        (["--checkpoint", "{run}", "--split", "test", "data.features=shards"], "no finished feature set"),
    ],
)
def test_what_cannot_be_scored(command: ModuleType, run_dir: Path, words: list[str], message: str) -> None:
    (run_dir / "eval").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        command.main(parsed(command, *(word.format(run=run_dir) for word in words)))


def test_a_damaged_checkpoint_is_refused(command: ModuleType, tmp_path: Path) -> None:
    run_dir = tiny_run(tmp_path)
    projector = run_dir / "checkpoints" / f"step-{BEST_STEP:08d}" / "projector.safetensors"
    data = bytearray(projector.read_bytes())
    data[-1] ^= 1
    projector.write_bytes(data)
    with pytest.raises(ValueError, match="projector.safetensors is damaged"):
        command.main(parsed(command, "--checkpoint", run_dir, "--split", "test"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_by_the_launcher(
    command: ModuleType, run_dir: Path, run_launcher: Callable, run_python: Callable, tmp_path: Path
) -> None:
    """Same transcripts from shards on two ranks as online on one."""
    run_python(ROOT / "shards" / "precompute.py", run_dir / "recipe.yaml")
    words = ["--checkpoint", run_dir, "--split", "test", "--base-whisper", "--output"]
    outcome = run_launcher(ROOT / "launch" / "evaluate.py", *words, tmp_path / "two", "data.features=shards")
    assert outcome.stdout.count("written:") == 1, "one rank speaks"
    command.main(parsed(command, *words, tmp_path / "one"))
    (two, two_lines), (one, one_lines) = results(tmp_path / "two"), results(tmp_path / "one")
    assert (two["num_ranks"], one["num_ranks"]) == (2, 1)
    assert [line["pred_text"] for line in two_lines] == [line["pred_text"] for line in one_lines]
    same = ("wer", "cer", "hits", "wer_swapped", "wer_encoder_base", "num_label_tokens", "wer_interval_95")
    assert {name: two[name] for name in same} == {name: one[name] for name in same}
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
