"""Recipes: three layers, numbers that are numbers, and every problem at once with its place."""

from pathlib import Path

import pytest
from conftest import ROOT

from graft.recipe import Recipe, load_recipe

GOOD = """\
bases:
  whisper: {whisper}
  qwen2_vl: Qwen/Qwen2-VL-2B-Instruct
data:
  manifests:
    train: lists/train.jsonl
stage1:
  learning_rate: 1e-4
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.format(whisper="base"))
    return path


def test_later_layers_win(file: Path) -> None:
    recipe = load_recipe(file, ["stage1.max_steps=77", "run.precision=fp32"])
    assert recipe.stage1.max_steps == 77 and recipe.run.precision == "fp32"
    assert recipe.stage1.learning_rate == 1e-4 and isinstance(recipe.stage1.learning_rate, float)
    assert recipe.stage2.max_steps == Recipe.model_fields["stage2"].default.max_steps


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_a_number_however_it_is_written(file: Path, text: str) -> None:
    assert load_recipe(file, [f"stage2.learning_rate={text}"]).stage2.learning_rate == 1e-4


def test_what_is_read_stands_relative_to_the_recipe(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    recipe = load_recipe(file, ["data.manifests.valid=lists/valid.jsonl", "data.shards=sets", "run.dir=runs/a"])
    assert recipe.bases.whisper == str(tmp_path / "base")
    assert recipe.bases.qwen2_vl == "Qwen/Qwen2-VL-2B-Instruct"  # a name on the hub stays one
    assert recipe.manifest("train") == tmp_path / "lists" / "train.jsonl"
    assert recipe.manifest("valid") == Path("/lists/valid.jsonl")  # said on the command line: the current folder
    assert recipe.set_folder("train") == Path("sets/train") and recipe.run.dir == "runs/a"


def test_resolved_settings_read_back_the_same(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["stage1.betas=[0.8, 0.9]"])
    again = tmp_path / "elsewhere" / "recipe.yaml"
    again.parent.mkdir()
    again.write_text(recipe.as_yaml())
    assert load_recipe(again) == recipe


def test_every_problem_at_once_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("bases:\n  whisper: w\nstage1:\n  max_steps: fast\n  learning_rat: 1e-4\nstagee2: {}\n")
    with pytest.raises(ValueError) as caught:
        load_recipe(path, ["run.dri=x", "run.seed=-1", "word"])
    told = str(caught.value).splitlines()
    assert len(told) == 8
    for expected in (
        f"{path}:1: bases.qwen2_vl: missing",
        f"{path}:4: stage1.max_steps: Input should be a valid integer",
        "(got 'fast')",
        f"{path}:5: stage1.learning_rat: unknown key; did you mean 'learning_rate'?",
        f"{path}:6: stagee2: unknown key; did you mean 'stage2'?",
        "'run.dri=x': run.dri: unknown key; did you mean 'dir'?",
        "'run.seed=-1': run.seed: Input should be greater than or equal to 0 (got -1)",
        "'word': expected section.key=value",
    ):
        assert expected in str(caught.value)


def test_a_key_of_another_section_is_found(file: Path) -> None:
    with pytest.raises(ValueError, match="run.max_steps: unknown key; did you mean 'stage1.max_steps'?"):
        load_recipe(file, ["run.max_steps=3"])


def test_numbers_that_contradict_each_other(file: Path) -> None:
    with pytest.raises(ValueError, match=r"stage2.warmup_steps \(50\) leaves nothing of stage2.max_steps \(9\)"):
        load_recipe(file, ["stage2.max_steps=9"])


@pytest.mark.parametrize(
    ("text", "told"), [("- a\n", "holds list"), ("a: [1\n", "is not YAML"), ("", "holds NoneType")]
)
def test_not_a_recipe(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        load_recipe(path)


def test_a_key_that_is_there_twice(file: Path, tmp_path: Path) -> None:
    """YAML takes the last one: what the first section held would be gone without a word."""
    twice = tmp_path / "twice.yaml"
    twice.write_text(file.read_text() + "stage1:\n  max_steps: 7\nstage1:\n  voice_mixing: 1\n")
    first = twice.read_text().splitlines().index("stage1:") + 1
    with pytest.raises(ValueError, match=rf"twice.yaml:\d+: stage1 is there already, at \S+twice.yaml:{first}$"):
        load_recipe(twice)


def test_a_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="tinny.yaml does not exist; did you mean .*tiny.yaml"):
        load_recipe(ROOT / "recipes" / "tinny.yaml")


def test_a_split_without_a_manifest(file: Path) -> None:
    with pytest.raises(ValueError, match="no manifest for split 'test'; data.manifests has: train"):
        load_recipe(file).manifest("test")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("more", {"more": 1.0}),
        ("{more: 1}", {"more": 1.0}),
        ("{more: 0.5}", {"more": 0.5}),
        ("{train: 1, noisy: 0.5}", {"noisy": 0.5, "train": 1.0}),
    ],
)
def test_one_split_or_a_mixture(file: Path, tmp_path: Path, written: str, meant: dict[str, float]) -> None:
    """In one order, however it is written; and read back the same."""
    recipe = load_recipe(file, [f"data.train_split={written}"])
    assert recipe.data.train_split == meant and list(recipe.data.train_split) == sorted(meant)
    (tmp_path / "again.yaml").write_text(recipe.as_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe and list(again.data.train_split) == sorted(meant)


def test_one_split_is_written_by_its_name(file: Path) -> None:
    assert load_recipe(file).model_dump()["data"]["train_split"] == "train"


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("{train: 1, noisy: 0}", "data.train_split.noisy: Input should be greater than 0 (got 0)"),
        ("{train: .inf}", "data.train_split.train: Input should be a finite number (got inf)"),
        ("{train: much}", "data.train_split.train: Input should be a valid number"),
        ("{}", "data.train_split: Dictionary should have at least 1 item"),
        ("[train, noisy]", "data.train_split: Input should be a valid dictionary (got ['train', 'noisy'])"),
    ],
)
def test_weights_that_mean_nothing(file: Path, written: str, told: str) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe(file, [f"data.train_split={written}"])
    assert told in str(error.value)
