"""Manifests from folders, other people's JSON lines, Kaldi folders and the digits."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from graft.data.audio import read_pcm
from graft.data.manifest import read_manifest
from shards.make_manifest import DIGITS, MOST_DIGITS, PAUSE_S, _arguments, main

FSDD = Path(__file__).resolve().parents[2] / "shared" / "data" / "fsdd"
needs_fsdd = pytest.mark.skipif(not FSDD.is_dir(), reason="../shared/data/fsdd (real recordings) is not there")


def make(*words: str | Path) -> None:
    main(_arguments().parse_args([str(word) for word in words]))


def sound(path: Path, seconds: float = 0.5, rate: int = 16_000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(len(path.name)).uniform(-0.3, 0.3, round(seconds * rate)), rate)
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def reasons(path: Path) -> dict[str, str]:
    return {line["id"]: line["reason"] for line in lines(path.with_suffix(".rejects.jsonl"))}


def test_folder(tmp_path: Path) -> None:
    source = tmp_path / "speech"
    sound(source / "a.wav", 0.5)
    (source / "a.txt").write_text("hello\r\nthere\n")
    sound(source / "deep" / "b.flac", 0.25, 8000)
    (source / "deep" / "b.txt").write_text("good\\nbye", "utf-8")
    sound(source / "84" / "84-121123-0000.flac", 0.75)
    sound(source / "84" / "84-121123-0001.flac", 0.75)
    (source / "84" / "84-121.trans.txt").write_text("84-121123-0000 GO DO YOU HEAR\n84-121123-0001\n")
    sound(source / "lonely.wav")
    sound(source / "mute.wav")
    (source / "mute.txt").write_text(" \n")
    (source / "torn.wav").write_bytes(b"RIFF....")
    (source / "torn.txt").write_text("torn")
    (source / "latin.txt").write_bytes(b"caf\xe9")
    sound(source / "latin.wav")
    sound(source / "a.flac")
    output = tmp_path / "out" / "m.jsonl"
    make("folder", source, "--output", output)
    assert lines(output) == [
        {
            "id": "84/84-121123-0000",
            "audio_filepath": "../speech/84/84-121123-0000.flac",
            "duration": 0.75,
            "text": "GO DO YOU HEAR",
        },
        {"id": "a", "audio_filepath": "../speech/a.flac", "duration": 0.5, "text": "hello there"},
        {"id": "deep/b", "audio_filepath": "../speech/deep/b.flac", "duration": 0.25, "text": "good bye"},
    ]
    told = reasons(output)
    assert told["84/84-121123-0001"] == "empty text" and told["mute"] == "empty text"
    assert "lonely.wav: no transcript" in told["lonely"]
    assert "not readable as audio" in told["torn"] and "not UTF-8" in told["latin"]
    assert "a.wav: id used before" in told["a"]
    assert len(read_manifest(output).utterances) == 3


def test_folder_without_sound(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no sound files"):
        make("folder", tmp_path, "--output", tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="does not exist"):
        make("folder", tmp_path / "none", "--output", tmp_path / "m.jsonl")


def test_nothing_usable_is_an_error_and_still_told(tmp_path: Path) -> None:
    sound(tmp_path / "speech" / "a.wav")
    with pytest.raises(ValueError, match="rejects.jsonl says why"):
        make("folder", tmp_path / "speech", "--output", tmp_path / "m.jsonl")
    assert "no transcript" in reasons(tmp_path / "m.jsonl")["a"]


def test_a_manifest_is_not_lost_where_nothing_can_be_used(tmp_path: Path) -> None:
    """As when the disk of the sound files is not mounted."""
    output = tmp_path / "m.jsonl"
    output.write_text("made before\n")
    sound(tmp_path / "speech" / "a.wav")
    with pytest.raises(ValueError, match="m.jsonl is not written"):
        make("folder", tmp_path / "speech", "--output", output)
    assert output.read_text() == "made before\n"


def test_a_source_is_not_written_over(tmp_path: Path) -> None:
    source = tmp_path / "m.jsonl"
    source.write_text('{"audio_filepath": "gone.wav", "text": "hello"}\n')
    with pytest.raises(ValueError, match="is the source itself"):
        make("jsonl", source, "--output", tmp_path / "elsewhere" / ".." / "m.jsonl")
    assert "hello" in source.read_text()


def test_jsonl(tmp_path: Path) -> None:
    sound(tmp_path / "in" / "a.wav", 2.0)
    source = tmp_path / "in" / "nemo.jsonl"
    given = [
        {"audio_filepath": "a.wav", "text": "whole"},
        {"audio_filepath": "a.wav", "text": "piece", "offset": 0.5, "duration": 1.25, "lang": "en"},
        {"audio_filepath": "a.wav", "text": "rest", "offset": 1.5},
        {"audio_filepath": "a.wav", "text": "beyond", "offset": 1.75, "duration": 1.0},
        {"key": "k", "source": "none.wav", "target": "missing"},
        {"key": "e", "source": "a.wav", "target": ""},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in given))
    output = tmp_path / "out.jsonl"
    make("jsonl", source, "--output", output)
    assert lines(output) == [
        {"id": "a", "audio_filepath": "in/a.wav", "duration": 2.0, "text": "whole"},
        {
            "id": "a@0.5",
            "audio_filepath": "in/a.wav",
            "duration": 1.25,
            "text": "piece",
            "offset": 0.5,
            "language": "en",
        },
        {"id": "a@1.5", "audio_filepath": "in/a.wav", "duration": 0.5, "text": "rest", "offset": 1.5},
    ]
    told = reasons(output)
    assert "0.250 s of audio, its manifest line says 1 s" in told["a@1.75"]
    assert "no such file" in told["k"] and told["e"] == "empty text"


def kaldi(folder: Path, **tables: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in tables.items():
        (folder / name.replace("_", ".")).write_text(text, "utf-8")
    return folder


def test_kaldi_recordings(tmp_path: Path) -> None:
    sound(tmp_path / "wav" / "one.wav", 1.5)
    sound(tmp_path / "data" / "two.flac", 0.5)
    source = kaldi(
        tmp_path / "data",
        wav_scp=f"u1 {tmp_path}/wav/one.wav\nu2   two.flac\nu3 gone.wav\nu4 two.flac\n",
        text="u1 hello  there\nu2 bye\nu3 gone\nu4\nu5 unheard\n",
        utt2spk="u1 ann\nu2 bob\n",
    )
    output = tmp_path / "m.jsonl"
    make("kaldi", source, "--output", output)
    assert lines(output) == [
        {"id": "u1", "audio_filepath": "wav/one.wav", "duration": 1.5, "text": "hello there", "speaker": "ann"},
        {"id": "u2", "audio_filepath": "data/two.flac", "duration": 0.5, "text": "bye", "speaker": "bob"},
    ]
    told = reasons(output)
    assert "no such file" in told["u3"] and told["u4"] == "empty text" and told["u5"] == "text without audio"


def test_rejects_are_numbered_by_their_lines(tmp_path: Path) -> None:
    """Whatever made them one: the manifest's own check, or the sound file."""
    sound(tmp_path / "good.wav", 1.0)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    said = [("good", "hello"), ("good2", " "), ("broken", "there")]
    source = tmp_path / "in.jsonl"
    told = [json.dumps({"id": name, "audio_filepath": f"{name.rstrip('2')}.wav", "text": text}) for name, text in said]
    source.write_text("\n\n" + "\n".join(told) + "\n")
    output = tmp_path / "m.jsonl"
    make("jsonl", source, "--output", output)
    rejects = [json.loads(line) for line in (tmp_path / "m.rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["id"]) for reject in rejects] == [(4, "good2"), (5, "broken")]


def test_kaldi_segments(tmp_path: Path) -> None:
    sound(tmp_path / "data" / "long.wav", 3.0)
    source = kaldi(
        tmp_path / "data",
        wav_scp="rec long.wav\n",
        segments="s1 rec 0.25 1.5\ns2 rec 1.5 -1\ns3 other 0 1\ns4 rec 2.5 4.0\ns5 rec 0 1\n",
        text="s1 first\ns2 second\ns3 third\ns4 fourth\n",
    )
    output = tmp_path / "m.jsonl"
    make("kaldi", source, "--output", output)
    assert [(u["id"], u.get("offset", 0), u["duration"]) for u in lines(output)] == [
        ("s1", 0.25, 1.25),
        ("s2", 1.5, 1.5),
    ]
    told = reasons(output)
    assert "'other' is not in wav.scp" in told["s3"] and told["s5"] == "no line in text"
    assert "0.500 s of audio, its manifest line says 1.5 s" in told["s4"]


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"wav_scp": "u1 sph2pipe -f wav a.sph |\n", "text": "u1 a\n"}, "'u1' is a command .*not run here"),
        ({"wav_scp": "u1 raw.ark:1234\n", "text": "u1 a\n"}, "expected the path of a sound file"),
        ({"wav_scp": "u1\n", "text": "u1 a\n"}, "expected the path of a sound file"),
        ({"wav_scp": "u1 a.wav\nu1 b.wav\n", "text": "u1 a\n"}, "wav.scp:2: 'u1' is there twice"),
        ({"wav_scp": "u1 a.wav\n"}, "text does not exist"),
        (
            {"wav_scp": "r a.wav\n", "segments": "s1 r 1.0 x\n", "text": "s1 a\n"},
            "expected a recording, its start and end",
        ),
        ({"wav_scp": "r a.wav\n", "segments": "s1\n", "text": "s1 a\n"}, "segments: 's1' has '' behind it"),
        ({"wav_scp": "r a.wav\n", "segments": "s1 r\n", "text": "s1 a\n"}, "segments: 's1' has 'r' behind it"),
        ({"wav_scp": "r a.wav\n", "segments": "s1 r 2.0 1.0\n", "text": "s1 a\n"}, "before its start"),
    ],
)
def test_kaldi_folders_that_cannot_be_used(tmp_path: Path, tables: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make("kaldi", kaldi(tmp_path / "data", **tables), "--output", tmp_path / "m.jsonl")


def test_tables_of_another_encoding(tmp_path: Path) -> None:
    source = kaldi(tmp_path / "data", wav_scp="u1 a.wav\n", text="u1 a\n")
    sound(source / "a.wav")
    (source / "text").write_bytes(b"\xef\xbb\xbfu1 hello\n")
    make("kaldi", source, "--output", tmp_path / "m.jsonl")
    assert [line["text"] for line in lines(tmp_path / "m.jsonl")] == ["hello"]
    (source / "text").write_bytes(b"u1 caf\xe9\n")
    with pytest.raises(ValueError, match="text: not UTF-8 at byte 6"):
        make("kaldi", source, "--output", tmp_path / "m.jsonl")


def digits(folder: Path, speakers: str = "ab", seconds: float = 0.4, indices: int = 8) -> Path:
    """Every digit by every speaker; each recording of its own length and loudness, so that it can be recognised."""
    folder.mkdir()
    chance = np.random.default_rng(3)
    for speaker in speakers:
        for digit in range(10):
            for index in range(indices):
                samples = chance.integers(1, 2000, round(8000 * chance.uniform(0.5, 1.0) * seconds)).astype(np.int16)
                soundfile.write(folder / f"{digit}_{speaker}_{index}.flac", samples, 8000)
    return folder


def parts_of(path: Path) -> list[np.ndarray]:
    """A joined utterance cut at its pauses (runs of zeros)."""
    samples, rate = read_pcm(path)
    assert rate == 8000
    heard = np.flatnonzero(samples)
    cuts = np.flatnonzero(np.diff(heard) > 1) + 1
    gaps = np.diff(heard)[cuts - 1] / rate
    assert ((gaps > PAUSE_S[0] - 0.001) & (gaps < PAUSE_S[1] + 0.001)).all()
    return np.split(samples[heard], cuts)


def check_digits(source: Path, manifest: Path, *, passes: int = 1, max_seconds: float = 3.9) -> Counter:
    """Every utterance is recordings of one speaker, untouched, and its text names them. Returns their counts."""
    known = {read_pcm(path)[0].tobytes(): path.stem for path in source.iterdir()}
    assert len(known) == len(list(source.iterdir()))
    used: Counter = Counter()
    for line in lines(manifest):
        names = [known[part.tobytes()] for part in parts_of(manifest.parent / line["audio_filepath"])]
        assert line["text"] == " ".join(DIGITS[int(name[0])] for name in names)
        assert {name.split("_")[1] for name in names} == {line["speaker"]}
        assert len(names) <= MOST_DIGITS and line["duration"] <= max_seconds
        used.update(names)
    assert set(used.values()) == {passes}
    return used


def test_connected_digits(tmp_path: Path) -> None:
    source = digits(tmp_path / "fsdd")
    make("fsdd", source, "--split", "train", "--seed", 1, "--output", tmp_path / "train.jsonl")
    make("fsdd", source, "--split", "test", "--seed", 1, "--output", tmp_path / "test.jsonl")
    train, test = (check_digits(source, tmp_path / f"{split}.jsonl") for split in ("train", "test"))
    assert len(train) == 2 * 10 * 3 and len(test) == 2 * 10 * 5 and not set(train) & set(test)
    assert all(int(name.split("_")[2]) < 5 for name in test)
    sizes = Counter(len(line["text"].split()) for line in lines(tmp_path / "test.jsonl"))
    assert set(sizes) == {2, 3, 4, 5}, sizes


def test_connected_digits_are_seeded(tmp_path: Path) -> None:
    source = digits(tmp_path / "fsdd", indices=6)
    made = {}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        folder = tmp_path / name
        make("fsdd", source, "--split", "all", "--seed", seed, "--output", folder / "m.jsonl")
        made[name] = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
    assert made["one"] == made["again"]
    assert made["one"] != made["two"]


def test_several_passes_join_anew(tmp_path: Path) -> None:
    source = digits(tmp_path / "fsdd", speakers="a", indices=6)
    make("fsdd", source, "--split", "all", "--passes", 3, "--output", tmp_path / "m.jsonl")
    check_digits(source, tmp_path / "m.jsonl", passes=3)
    texts = [line["text"] for line in lines(tmp_path / "m.jsonl")]
    assert texts[: len(texts) // 3] != texts[len(texts) // 3 : 2 * len(texts) // 3]


def test_speakers_can_be_chosen_and_left_out(tmp_path: Path) -> None:
    source = digits(tmp_path / "fsdd", speakers="abc", indices=6)
    make("fsdd", source, "--split", "train", "--leave-out", "b", "--output", tmp_path / "seen.jsonl")
    make("fsdd", source, "--split", "all", "--speakers", "b", "--output", tmp_path / "unseen.jsonl")
    assert {line["speaker"] for line in lines(tmp_path / "seen.jsonl")} == {"a", "c"}
    assert {line["speaker"] for line in lines(tmp_path / "unseen.jsonl")} == {"b"}
    with pytest.raises(ValueError, match="no speaker 'd'; there are a, b, c"):
        make("fsdd", source, "--leave-out", "d", "--output", tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="no recordings left"):
        make("fsdd", source, "--speakers", "a", "--leave-out", "a", "--output", tmp_path / "m.jsonl")


def test_fewer_digits_rather_than_a_cut(tmp_path: Path) -> None:
    source = digits(tmp_path / "fsdd", speakers="a", seconds=1.0, indices=6)
    make("fsdd", source, "--split", "all", "--max-seconds", 1.6, "--output", tmp_path / "m.jsonl")
    check_digits(source, tmp_path / "m.jsonl", max_seconds=1.6)
    assert {len(line["text"].split()) for line in lines(tmp_path / "m.jsonl")} <= {1, 2}
    make("fsdd", source, "--split", "all", "--max-seconds", 0.8, "--output", tmp_path / "short.jsonl")
    told = reasons(tmp_path / "short.jsonl")
    used = sum(len(line["text"].split()) for line in lines(tmp_path / "short.jsonl"))
    assert told and used + len(told) == 60
    assert all("longer than --max-seconds 0.8" in reason for reason in told.values())


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    sound(tmp_path / "other" / "a.wav")
    with pytest.raises(ValueError, match="<digit>_<speaker>_<index>"):
        make("fsdd", tmp_path / "other", "--output", tmp_path / "m.jsonl")


@needs_fsdd
def test_the_real_digits(tmp_path: Path) -> None:
    make("fsdd", FSDD, "--split", "test", "--seed", 1, "--output", tmp_path / "test.jsonl")
    made = lines(tmp_path / "test.jsonl")
    assert sum(len(line["text"].split()) for line in made) == 200
    assert {line["speaker"] for line in made} == {"george", "jackson", "lucas", "nicolas"}
    assert max(line["duration"] for line in made) <= 3.9
    assert {len(line["text"].split()) for line in made} == {2, 3, 4, 5}


def test_the_command(tmp_path: Path, run_python) -> None:
    sound(tmp_path / "speech" / "a.wav", 61.5)
    sound(tmp_path / "speech" / "b.wav")
    (tmp_path / "speech" / "a.txt").write_text("a long one")
    done = run_python("shards/make_manifest.py", "folder", tmp_path / "speech", "--output", tmp_path / "m.jsonl")
    assert "1 utterances, 1:02 of audio" in done.stdout
    assert "1 rejected, listed in" in done.stdout and "1 x no transcript, neither" in done.stdout
    failed = run_python("shards/make_manifest.py", "folder", tmp_path / "none", "--output", "m.jsonl", expect=2)
    assert failed.stderr.strip() == f"error: {tmp_path / 'none'} does not exist"
