"""Every manifest line ends as used, rejected with a reason, or reported as a fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.data.manifest import (
    Reject,
    Utterance,
    common,
    parse_line,
    read_manifest,
    sample_key,
    write_manifest,
    write_rejects,
)


def manifest(folder: Path, *lines: Any, audio: tuple[str, ...] = ("a.wav", "b.wav", "c.wav")) -> Path:
    for name in audio:
        (folder / name).write_bytes(b"x")
    path = folder / "m.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), "utf-8")
    return path


def ours(name: str = "a", **other: Any) -> dict[str, Any]:
    return {"id": name, "audio_filepath": f"{name}.wav", "duration": 1.5, "text": f"text of {name}"} | other


def test_our_own_lines(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        ours("a"),
        ours("b", offset=0.25, instruction="Translate.", language="de", speaker="s1", more=[1]),
    )
    read = read_manifest(path)
    assert read.utterances == [
        Utterance("a", tmp_path / "a.wav", 1.5, "text of a"),
        Utterance("b", tmp_path / "b.wav", 1.5, "text of b", 0.25, "Translate.", "de", "s1"),
    ]
    assert read.rejects == [] and read.lines == [1, 2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            {"audio_filepath": "a.wav", "duration": 2, "text": "nemo", "offset": 1.5, "lang": "en"},
            Utterance("a@1.5", Path("a.wav"), 2.0, "nemo", 1.5, language="en"),
        ),
        ({"key": "k7", "source": "a.wav", "target": "slam"}, Utterance("k7", Path("a.wav"), None, "slam")),
        ({"audio": "d/a.b.wav", "sentence": "hf"}, Utterance("d/a.b", Path("d/a.b.wav"), None, "hf")),
        ({"path": "a.mp3", "transcription": "hf"}, Utterance("a", Path("a.mp3"), None, "hf")),
        ({"audio": {"path": "a.wav", "sampling_rate": 16000}, "text": "hf"}, Utterance("a", Path("a.wav"), None, "hf")),
        (
            {"audio_filepath": "a.wav", "context": "Answer.", "answer": "yes", "duration": 1.0},
            Utterance("a", Path("a.wav"), 1.0, "yes", instruction="Answer."),
        ),
        ({"id": 17, "audio": "a.wav", "text": " a\\nb\r\n"}, Utterance("17", Path("a.wav"), None, "a b")),
        ({"id": "x", "audio": "/abs/a.wav", "text": "t"}, Utterance("x", Path("/abs/a.wav"), None, "t")),
    ],
)
def test_key_names_of_others(line: dict[str, Any], expected: Utterance) -> None:
    assert parse_line(line, Path(".")) == expected


def test_paths_are_relative_to_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "audio").mkdir(parents=True)
    (tmp_path / "data" / "audio" / "a.wav").write_bytes(b"x")
    path = manifest(tmp_path / "data", ours("a", audio_filepath="audio/a.wav"))
    monkeypatch.chdir(tmp_path)
    (read,) = read_manifest(path.relative_to(tmp_path)).utterances
    assert read.audio_filepath.is_file() and read.audio_filepath == Path("data/audio/a.wav")


def test_all_faults_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        ours("a"),
        "{not json",
        "",
        '["a", "list"]',
        {"id": "b", "text": "no audio"},
        {"id": "c", "audio_filepath": "c.wav"},
        ours("a", text="again"),
        ours("b", duration="long"),
        ours("b", duration=float("nan")),
        ours("b", offset=-1),
        ours("", id=""),
        ours("b", text=["t"]),
        '{"id": "b", "audio": "b.wav", "text": "half \\ud800"}',
        '{"id": "b", "audio": "b.wav", "text": "t", "duration": 1' + "0" * 5000 + "}",
        '{"id": "b", "audio": "b.wav", "text": "t", "duration": 1' + "0" * 400 + "}",
    )
    path.write_bytes(path.read_bytes() + b'{"id": "\xff"}\n')
    with pytest.raises(ValueError) as error:
        read_manifest(path)
    told = str(error.value)
    for line, what in (
        (2, "not JSON"),
        (4, "a JSON list, expected an object"),
        (5, "no audio path"),
        (6, "no text"),
        (7, "id 'a' is already on line 1"),
        (8, "duration is 'long', expected seconds"),
        (9, "duration is 'nan'"),
        (10, "offset is '-1'"),
        (11, "id is ''"),
        (12, "no text"),
        (13, "text holds half of a surrogate pair"),
        (14, "not JSON that can be read"),
        (15, "duration is '1000"),
        (16, "not JSON"),
    ):
        assert f"{path}:{line}: {what}" in told, (line, told)


def test_many_faults_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.\.\. and 17 more") as error:
        read_manifest(manifest(tmp_path, *["{"] * 37))
    assert str(error.value).count("not JSON") == 20


def test_what_cannot_be_used_is_rejected_and_the_rest_used(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        ours("a", text=" \\n \r\n"),
        ours("missing"),
        ours("b"),
        ours("c", duration=0),
        ours("d", image="d.png"),
    )
    read = read_manifest(path)
    assert [u.id for u in read.utterances] == ["b"] and read.lines == [3]
    assert [(r.line, r.id) for r in read.rejects] == [(1, "a"), (2, "missing"), (4, "c"), (5, "d")]
    assert read.rejects[0].reason == "empty text"
    assert "missing.wav: no such file" in read.rejects[1].reason
    assert "empty audio" in read.rejects[2].reason
    assert "an image beside the audio" in read.rejects[3].reason
    unlooked = read_manifest(path, check_files=False)
    assert [u.id for u in unlooked.utterances] == ["missing", "b"]
    assert len(unlooked.utterances) + len(unlooked.rejects) == 5


def test_a_rejected_id_is_still_taken(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="id 'a' is already on line 1"):
        read_manifest(manifest(tmp_path, ours("a", text=""), ours("a")))


@pytest.mark.parametrize("content", ["", "\n\n", None])
def test_no_manifest(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(ValueError, match="holds no lines" if content is not None else "does not exist"):
        read_manifest(tmp_path / "m.jsonl")


def test_byte_order_mark_crlf_and_odd_separators(tmp_path: Path) -> None:
    path = manifest(tmp_path)
    line = json.dumps(ours("a", text="one\u2028two"), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n" + json.dumps(ours("b")).encode())
    assert [(u.id, u.text) for u in read_manifest(path).utterances] == [("a", "one two"), ("b", "text of b")]


TEXT = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=9)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT, st.floats(0.01, 1e4), st.floats(0, 9)), min_size=1, unique_by=lambda t: t[0]))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple]) -> None:
    folder = tmp_path_factory.mktemp("m")
    written = [
        Utterance(name, folder / "audio" / "x.wav", duration, text, offset, speaker="s")
        for name, text, duration, offset in drawn
        if "\\" not in text
    ]
    if not written:
        return
    write_manifest(folder / "m.jsonl", written)
    read = read_manifest(folder / "m.jsonl", check_files=False)
    from graft.data.text import clean_text

    assert [(u.id, u.text, u.duration, u.offset, u.speaker) for u in read.utterances] == [
        (u.id, clean_text(u.text), u.duration, u.offset, "s") for u in written
    ]
    assert {u.audio_filepath for u in read.utterances} == {folder / "audio" / "x.wav"}
    assert '"audio_filepath": "audio/x.wav"' in (folder / "m.jsonl").read_text()


def test_a_manifest_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken():
        yield Utterance("a", tmp_path / "a.wav", 1.0, "a")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        write_manifest(tmp_path / "m.jsonl", broken())
    assert not (tmp_path / "m.jsonl").exists()


def test_rejects_are_written(tmp_path: Path) -> None:
    write_rejects(tmp_path / "r.jsonl", [Reject(3, "é", "empty text")])
    assert (tmp_path / "r.jsonl").read_text("utf-8") == '{"line": 3, "id": "é", "reason": "empty text"}\n'


def test_common_reasons() -> None:
    assert common(["a.wav: torn", "empty text", "b.wav: torn", "x: y: torn"]) == "3 x torn; 1 x empty text"


def test_keys_hold_nothing_that_webdataset_cuts_at() -> None:
    assert sample_key("84-121123-0000") == "84-121123-0000"
    assert sample_key("dir/a.b c") == "dir%2Fa%2Eb%20c"
    assert sample_key("x" * 80) == "x" * 80


@settings(deadline=None)
@given(st.lists(st.text(min_size=1), min_size=2, unique=True))
def test_different_ids_have_different_keys(ids: list[str]) -> None:
    keys = [sample_key(i) for i in ids if i.isprintable() or i.isascii()]
    assert len(set(keys)) == len(keys)
    assert all(len(key) <= 80 and key.isascii() and not set("./~") & set(key) for key in keys)
