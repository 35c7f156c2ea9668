"""Sound files of all kinds become text; what cannot be read is named and loses nothing else."""

from __future__ import annotations

import importlib.util
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import soundfile
import soxr
import torch
from safetensors.torch import load_file
from tiny_run import noise, tiny_run

from graft.recipe import load_recipe
from graft.run_dir import find_checkpoint

ROOT = Path(__file__).resolve().parents[1]
WINDOW_SAMPLES = 16_000  # of the tiny Whisper: one second


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """launch/transcribe.py as a module; it changes sys.path, which is put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("launch_transcribe", ROOT / "launch" / "transcribe.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module


def parsed(command: ModuleType, *words: object) -> Namespace:
    return command.arguments_parser().parse_args([str(word) for word in words])


def told(out: str) -> dict[str, str]:
    """Text by path, from the lines on stdout."""
    return {path: text for path, _, text in (line.partition(": ") for line in out.splitlines())}


def scribe(command: ModuleType, run_dir: Path, instruction: str | None = None) -> object:
    recipe = load_recipe(run_dir / "recipe.yaml")
    return command.Scribe(recipe, find_checkpoint(run_dir), torch.device("cpu"), instruction)


@pytest.fixture
def sounds(tmp_path: Path) -> list[Path]:
    """Two seconds of different noise in every kind of file, rate and number of channels."""
    files = {
        "a.wav": (16_000, 1),
        "b.flac": (44_100, 2),
        "c.mp3": (22_050, 1),
        "d.ogg": (8_000, 1),
        "e.wav": (48_000, 2),
    }
    for number, (name, (rate, channels)) in enumerate(files.items()):
        sound = noise(0.3 + 0.1 * number, rate, seed=number)
        soundfile.write(tmp_path / name, np.stack([sound] * channels, axis=1), rate)
    return [tmp_path / name for name in files]


def test_every_kind_of_file_in_the_order_given(
    command: ModuleType, run_dir: Path, sounds: list[Path], capsys: pytest.CaptureFixture
) -> None:
    assert command.main(parsed(command, "--checkpoint", run_dir, *sounds)) == 0
    captured = capsys.readouterr()
    assert list(told(captured.out)) == list(map(str, sounds))
    assert len(set(told(captured.out).values())) > 1, "the model hears no difference, so this proves nothing"


def test_the_trained_projector_is_used(command: ModuleType, run_dir: Path) -> None:
    trained = load_file(find_checkpoint(run_dir) / "projector.safetensors")
    used = scribe(command, run_dir).model.model.multi_modal_projector.state_dict()
    assert trained.keys() == used.keys() and all(torch.equal(trained[name], used[name]) for name in trained)


def test_a_bad_file_is_named_and_the_others_are_done(
    command: ModuleType, run_dir: Path, sounds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "text.wav").write_text("this is no sound")
    (tmp_path / "empty.wav").write_bytes(b"")
    bad = [tmp_path / "text.wav", tmp_path / "empty.wav", tmp_path / "gone.wav"]
    mixed = [bad[0], sounds[0], bad[1], sounds[1], sounds[2], bad[2]]
    assert command.main(parsed(command, "--checkpoint", run_dir, *mixed)) == 2
    captured = capsys.readouterr()
    assert list(told(captured.out)) == list(map(str, sounds[:3]))
    assert captured.err.count("error: ") == 3 and all(str(path) in captured.err for path in bad)
    alone = {}
    for path in sounds[:3]:
        assert command.main(parsed(command, "--checkpoint", run_dir, path)) == 0
        alone |= told(capsys.readouterr().out)
    assert told(captured.out) == alone, "each file has its own transcript"


def test_json(
    command: ModuleType, run_dir: Path, sounds: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    gone = tmp_path / "gone.wav"
    assert command.main(parsed(command, "--checkpoint", run_dir, "--json", sounds[1], gone)) == 2
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["audio_filepath"], first["duration"]) == (str(sounds[1]), pytest.approx(0.4, abs=0.001))
    assert first["pred_text"] and "error" not in first
    assert second == {"audio_filepath": str(gone), "error": f"{gone}: no such file"}


def test_rate_and_channels_do_not_change_what_is_heard(command: ModuleType, run_dir: Path, tmp_path: Path) -> None:
    """The frames of a file are those of the encoder on the same waveform, resampled and mixed down."""
    left, right = noise(0.5, 44_100, seed=1), noise(0.5, 44_100, seed=2)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), 44_100, subtype="FLOAT")
    waveform = soxr.resample((left + right) / 2, 44_100, 16_000, quality="HQ")
    made = scribe(command, run_dir)
    assert torch.equal(made.hear(str(tmp_path / "stereo.wav")).audio_features, made.encoder.encode([waveform])[0])


def test_longer_than_the_window_is_joined(
    command: ModuleType, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    waveform = noise(2.3, 16_000)
    soundfile.write(tmp_path / "long.wav", waveform, 16_000, subtype="FLOAT")
    made = scribe(command, run_dir)
    heard = made.hear(str(tmp_path / "long.wav"))
    pieces = [waveform[:WINDOW_SAMPLES], waveform[WINDOW_SAMPLES : 2 * WINDOW_SAMPLES], waveform[2 * WINDOW_SAMPLES :]]
    assert heard.num_windows == 3 and len(heard.audio_features) == 115  # 2.3 s of 50 frames, none lost
    assert torch.equal(heard.audio_features, torch.cat(made.encoder.encode(pieces)))
    assert "longer than the 1 s this model was trained on" in capsys.readouterr().err
    (result,) = made.transcribe([str(tmp_path / "long.wav")])
    assert result.error is None and result.duration == pytest.approx(2.3)


def test_long_and_short_files_keep_their_order(command: ModuleType, run_dir: Path, tmp_path: Path) -> None:
    names = []
    for number, seconds in enumerate([0.2, 1.4, 0.3, 0.4, 0.5, 1.1]):
        soundfile.write(tmp_path / f"{number}.wav", noise(seconds, 16_000, seed=number), 16_000)
        names.append(str(tmp_path / f"{number}.wav"))
    results = list(scribe(command, run_dir).transcribe(names))
    assert [result.path for result in results] == names
    assert [round(result.duration, 3) for result in results] == [0.2, 1.4, 0.3, 0.4, 0.5, 1.1]


def test_longer_than_the_language_model_can_take(command: ModuleType, run_dir: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "endless.wav", np.zeros(60 * 16_000, np.float32), 16_000)
    (result,) = scribe(command, run_dir).transcribe([str(tmp_path / "endless.wav")])
    assert "60 s need" in result.error and "the language model has 512: cut the file" in result.error


def prompts_of(made: object, sound: Path) -> str:
    """What the model is asked when ``sound`` is transcribed."""
    asked, original = [], made.model.generate

    def listen(**inputs: torch.Tensor) -> torch.Tensor:
        asked.append(made.template.processor.tokenizer.decode(inputs["input_ids"][0]))
        return original(**inputs)

    made.model.generate = listen
    list(made.transcribe([str(sound)]))
    return "".join(asked)


def test_another_instruction_is_in_the_prompt(command: ModuleType, run_dir: Path, sounds: list[Path]) -> None:
    asked = [
        prompts_of(scribe(command, run_dir, instruction), sounds[0]) for instruction in (None, "What language is this?")
    ]
    assert "Transcribe the speech." in asked[0] and "What language is this?" not in asked[0]
    assert "What language is this?" in asked[1] and "Transcribe the speech." not in asked[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_as_a_command(run_dir: Path, run_python: Callable, sounds: list[Path], tmp_path: Path) -> None:
    """From another folder, with nothing but paths on the command line; exit codes as promised."""
    script = ROOT / "launch" / "transcribe.py"
    outcome = run_python(
        script, "--checkpoint", run_dir, sounds[0], tmp_path / "gone.wav", sounds[1], cwd=tmp_path, expect=2
    )
    assert list(told(outcome.stdout)) == list(map(str, sounds[:2])), "nothing but transcripts on stdout"
    assert "gone.wav: no such file" in outcome.stderr
    missing = run_python(script, "--checkpoint", tmp_path / "no-run", sounds[0], expect=2)
    assert "no-run does not exist: looked for" in missing.stderr and "Traceback" not in missing.stderr
