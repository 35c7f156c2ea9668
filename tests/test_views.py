"""Other ways to hear an utterance: what each does to the sound, and that each is an utterance of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_precompute import RATE, WINDOW, StubEncoder, corpus, files, play, read_lines, recipe, refuse

from graft.data.audio import change_speed, load_audio
from graft.data.loader import OnlineSource
from graft.data.manifest import Manifest, Reject, Utterance
from graft.data.views import load_utterance, read_split, with_views
from graft.lengths import SAMPLE_RATE, num_samples
from graft.ranks import Ranks
from graft.recipe import Recipe, View, load_recipe
from graft.sources import open_set
from shards.precompute import precompute

TINY = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"
SLOW, NOISY, SOFT = View(speed=0.8), View(speed=1.25, snr_db=12), View(gain_db=-20)


@pytest.fixture(scope="module")
def utterance(tmp_path_factory: pytest.TempPathFactory) -> Utterance:
    """A tone of 400 Hz, half a second."""
    path = tmp_path_factory.mktemp("views") / "tone.wav"
    tone = 0.5 * np.sin(2 * np.pi * 400 * np.arange(8000) / SAMPLE_RATE)
    soundfile.write(path, tone, SAMPLE_RATE, subtype="FLOAT")
    return Utterance("a", path, 0.5, "tone")


def heard(utterance: Utterance, view: View | None, name: str = "a") -> np.ndarray:
    return load_utterance(replace(utterance, id=name, view=view))


def pitch(waveform: np.ndarray) -> float:
    return np.abs(np.fft.rfft(waveform)).argmax() * SAMPLE_RATE / len(waveform)


def test_speed_moves_length_and_pitch(utterance: Utterance) -> None:
    slow, fast = heard(utterance, SLOW), heard(utterance, View(speed=1.25))
    assert (len(slow), len(fast)) == (10_000, 6_400)
    assert abs(pitch(slow) - 320) < 2 and abs(pitch(fast) - 500) < 3
    assert replace(utterance, view=SLOW).heard_s == 0.625 and utterance.heard_s == 0.5
    assert replace(utterance, duration=None, view=SLOW).heard_s is None


@settings(max_examples=60, deadline=None)
@given(st.integers(200, 20_000), st.floats(0.5, 2))
def test_the_length_is_known_without_the_sound(size: int, speed: float) -> None:
    """Or the frames that a plan counts on would not be those that come."""
    changed = change_speed(np.ones(size, np.float32), speed)
    assert abs(len(changed) - num_samples(size / SAMPLE_RATE / speed)) <= 1
    assert changed.dtype == np.float32


def test_noise_is_as_far_below_as_it_says(utterance: Utterance) -> None:
    plain, noisy = heard(utterance, None), heard(utterance, View(snr_db=12))
    noise = noisy - plain
    assert abs(10 * np.log10(np.mean(plain**2) / np.mean(noise**2)) - 12) < 0.05
    assert abs(np.corrcoef(plain, noise)[0, 1]) < 0.3
    spectrum = np.abs(np.fft.rfft(noise)) ** 2
    near = slice(*(round(f * len(noise) / SAMPLE_RATE) for f in (300, 500)))  # where the tone is
    assert spectrum[near].sum() > 0.9 * spectrum.sum()
    assert noisy.dtype == np.float32


def test_noise_follows_from_the_utterance(utterance: Utterance) -> None:
    np.testing.assert_array_equal(heard(utterance, NOISY), heard(utterance, NOISY))
    assert not np.array_equal(heard(utterance, NOISY), heard(utterance, NOISY, name="b"))


def test_gain(utterance: Utterance) -> None:
    np.testing.assert_allclose(heard(utterance, SOFT), 0.1 * load_audio(utterance.audio_filepath), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 40, 129])
def test_noise_on_a_click(tmp_path: Path, size: int) -> None:
    soundfile.write(tmp_path / "click.wav", np.full(size, 0.5), SAMPLE_RATE, subtype="FLOAT")
    noisy = heard(Utterance("a", tmp_path / "click.wav", None, "x"), View(snr_db=0))
    assert noisy.shape == (size,) and np.isfinite(noisy).all()


def test_noise_on_silence_is_silence(tmp_path: Path) -> None:
    """Silence is refused where it is encoded; a view must not hide it."""
    soundfile.write(tmp_path / "none.wav", np.zeros(800), SAMPLE_RATE)
    assert not heard(Utterance("a", tmp_path / "none.wav", None, "x"), NOISY).any()


def test_each_view_is_an_utterance_of_its_own(utterance: Utterance) -> None:
    plain = Manifest(utterance.audio_filepath, [utterance], [Reject(2, "b", "empty text")], [1], "sum")
    viewed = with_views(plain, [SLOW, NOISY])
    assert [u.id for u in viewed.utterances] == ["a", "a@speed=0.8", "a@speed=1.25,snr_db=12"]
    assert [u.view for u in viewed.utterances] == [None, SLOW, NOISY]
    assert {u.text for u in viewed.utterances} == {"tone"} and viewed.lines == [1, 1, 1]
    assert [(r.line, r.id) for r in viewed.rejects] == [(2, "b"), (2, "b@speed=0.8"), (2, "b@speed=1.25,snr_db=12")]
    sums = {with_views(plain, views).sha256 for views in ([], [SLOW], [NOISY], [SLOW, NOISY])}
    assert len(sums) == 4 and with_views(plain, []) is plain


def test_a_name_that_a_view_would_take(utterance: Utterance) -> None:
    twins = Manifest(Path("m.jsonl"), [utterance, replace(utterance, id="a@speed=0.8")], [], [1, 2])
    with pytest.raises(ValueError, match=r"m\.jsonl: 'a@speed=0\.8' is also the name of another line's view"):
        with_views(twins, [SLOW])


def test_a_recipe_says_which_splits_have_views() -> None:
    recipe = load_recipe(TINY, ["data.views={train: [{speed: 0.9}, {speed: 1.1, snr_db: 15}]}"])
    train, valid = (read_split(recipe, split).utterances for split in ("train", "valid"))
    assert len(train) == 3 * sum(u.view is None for u in train) and all(u.view is None for u in valid)


@pytest.mark.parametrize(
    ("views", "says"),
    [
        ("{train: [{}]}", "a view changes something"),
        ("{train: [{speed: 1.0}]}", "a view changes something"),
        ("{train: [{speed: 0.9}, {speed: 0.9}]}", "data.views.train holds speed=0.9 twice"),
        ("{trian: [{speed: 0.9}]}", "names split 'trian', data.manifests has: train, valid, test"),
        ("{train: [{sped: 0.9}]}", "data.views.train.0.sped: unknown key; did you mean 'speed'"),
        ("{train: [{speed: 3}]}", "less than or equal to 2"),
    ],
)
def test_views_that_cannot_be(views: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_recipe(TINY, [f"data.views={views}"])


def with_data(settings: Recipe, **data: object) -> Recipe:
    return settings.model_copy(update={"data": settings.data.model_copy(update=data)})


def test_every_view_is_there(tmp_path: Path) -> None:
    """With features of its own; a view that the window does not hold is a reject of its own."""
    manifest = corpus(tmp_path)
    views = [View(speed=0.9), View(speed=1.25, snr_db=10)]
    settings = with_data(recipe(manifest, tmp_path / "a"), views={"train": views})
    encoder = StubEncoder()
    precompute(settings, "train", encoder, Ranks())
    made = open_set(settings, "train", encoder.fingerprint)
    plain = [line["id"] for line in read_lines(manifest)]
    names = [name for each in plain for name in (each, f"{each}@speed=0.9", f"{each}@speed=1.25,snr_db=10")]
    rejects = read_lines(tmp_path / "a" / "train" / "rejects.jsonl")
    assert [r["id"] for r in rejects] == ["u.22@speed=0.9"]  # 0.914 s long: 1.016 s
    assert [e.id for e in made.entries] == [name for name in names if name != "u.22@speed=0.9"]
    as_it_is, slower, noisy = (made.entries[i] for i in (9, 10, 11))
    assert slower.duration == pytest.approx(as_it_is.duration / 0.9, abs=1 / RATE)
    assert noisy.duration == pytest.approx(as_it_is.duration / 1.25, abs=1 / RATE)
    online = OnlineSource(read_split(settings, "train"), encoder.encode, window=WINDOW)
    assert [(e.id, e.num_frames) for e in online.entries] == [(e.id, e.num_frames) for e in made.entries]
    for features, number in zip(online.read_many([9, 10, 11]), (9, 10, 11), strict=True):
        assert torch.equal(features[:, :2], made.read(number)[:, :2])
    by_two = with_data(settings, shards=str(tmp_path / "b"))
    assert files(play(by_two, 2, StubEncoder())) == files(tmp_path / "a" / "train")


def test_a_set_without_the_views_that_are_asked_for(tmp_path: Path) -> None:
    """Is refused by what would train on it and by what would write over it."""
    manifest = corpus(tmp_path)
    precompute(recipe(manifest, tmp_path), "train", StubEncoder(), Ranks())
    settings = with_data(recipe(manifest, tmp_path), views={"train": [View(speed=0.9), View(speed=1.1)]})
    with pytest.raises(ValueError, match=r"'train' in .* holds no utterance as speed=0.9 or speed=1.1, which data.v"):
        open_set(settings, "train")
    refuse(settings, StubEncoder(), "another feature set: manifest or data.views was")
