"""The benchmarks compute what they say: turns, the rule of agreement, counts by hand, the page made from results."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import harness, losses, mini, report, saved, shapes, zero2
from benchmarks.harness import Figure, Round, Spent
from graft.data.prompt import IGNORE_INDEX


def test_sides_take_turns_and_each_begins_once() -> None:
    heard: list[str] = []
    sides = {name: lambda name=name: heard.append(name) for name in "abc"}
    harness.rounds(sides, lambda: Spent(1.0, 1.0), num_rounds=4)
    assert "".join(heard) == "abcbcacababc"


def test_disturbed_rounds_are_left_out_and_made_up_for() -> None:
    speeds = iter([6.0, 10.0, 6.9, 7.1, 9.0])
    taken = harness.rounds({"a": lambda: None}, lambda: Spent(next(speeds), 1.0), num_rounds=2)
    assert [r.probe.wall for r in taken] == [10.0, 7.1]


def test_rounds_end_on_a_machine_that_is_never_quiet() -> None:
    speeds = iter([1.0, 2.0, 4.0, 8.0])
    taken = harness.rounds({"a": lambda: None}, lambda: Spent(next(speeds), 1.0), num_rounds=2)
    assert [r.probe.wall for r in taken] == [8.0]


def test_a_ratio_is_of_best_times_by_both_clocks() -> None:
    taken = [
        Round({"peer": Spent(9.0, 16.0), "ours": Spent(2.0, 4.0)}, Spent(1.0, 1.0)),
        Round({"peer": Spent(6.0, 18.0), "ours": Spent(3.0, 5.0)}, Spent(1.0, 1.0)),
    ]
    value, published, facts = harness.ratio(taken, "peer", "ours", weight=2.0)
    assert (value, facts["cpu"], facts["rounds"]) == (6.0, 8.0, 2) and not published


@pytest.mark.parametrize(
    ("wall", "cpu", "num_rounds", "published"),
    [(2.0, 2.19, 5, True), (2.0, 2.21, 5, False), (2.21, 2.0, 5, False), (2.0, 2.0, 4, False)],
)
def test_clocks_must_agree_within_a_tenth_over_five_rounds(
    wall: float, cpu: float, num_rounds: int, published: bool
) -> None:
    assert harness.publishable(wall, cpu, num_rounds) == published


def test_cpu_time_is_not_wall_time() -> None:
    spent = harness.timed(lambda: time.sleep(0.05))
    assert spent.wall >= 0.05 > 10 * spent.cpu


@pytest.mark.parametrize(
    ("value", "target", "published", "met"),
    [
        (22.0, ">= 22", True, True),
        (21.9, ">= 22", True, False),
        (30.0, ">= 22", False, False),
        (1.02, "<= 1.02", True, True),
        (1.03, "<= 1.02", True, False),
        (1.03, "", True, None),
    ],
)
def test_a_target_is_met_only_by_a_published_figure(value: float, target: str, published: bool, met: bool) -> None:
    assert Figure("f", value, "x", "what", target, published).met is met


def test_results_become_the_page(tmp_path: Path) -> None:
    figures = [
        Figure("count.seven", 7.0, "x", "sevens of a kind", "<= 8", facts={"pips": 3.14159}),
        Figure("step.blurred", 5.0, "x", "a time", ">= 4", published=False),
    ]
    harness.write("dice", "abc1234", figures, tmp_path)
    told = json.loads((tmp_path / "dice.json").read_text())
    assert told["machine"]["threads"] == torch.get_num_threads() and set(told["versions"]) >= {"torch", "deepspeed"}
    page = report.write_page(tmp_path, tmp_path / "docs" / "page.md").read_text()
    assert "| count.seven | 7 x | <= 8 | met | sevens of a kind. pips 3.142 |" in page
    assert "| step.blurred | not published | >= 4 | **missed** | a time.  |" in page
    assert f"`python -m benchmarks dice` at commit abc1234; {told['machine']['cpu']}" in page


def test_no_results_no_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results"):
        report.write_page(tmp_path, tmp_path / "page.md")
    assert not (tmp_path / "page.md").exists()


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["paddings"]) == 2
    assert "no benchmark paddings; there are: padding" in capsys.readouterr().err


def test_the_miniature_has_the_proportions_of_the_7b() -> None:
    layers = 7 * sum(n * m for n, m in shapes.MINI.layer_shapes)
    full = 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert shapes.MINI.hidden * shapes.MINI.vocab / layers == pytest.approx(3584 * 152064 / full, rel=0.01)


def test_a_step_holds_every_clip_once_at_its_length() -> None:
    batches = mini.step_batches(stack_factor=8)
    frames = mini.clip_frames()
    assert sorted(id for batch in batches for id in batch.ids) == sorted(f"clip {n}" for n in range(mini.NUM_CLIPS))
    for batch in batches:
        expected = [20 + -(-frames[int(id.split()[1])] // 8) + 10 + 30 for id in batch.ids]
        assert batch.attention_mask.sum(1).tolist() == expected
        assert (batch.labels != IGNORE_INDEX).sum(1).tolist() == [30] * len(batch.ids)


def test_saved_storages_count_once_and_parameters_not() -> None:
    """exp keeps its result of 5 x 3 numbers, the square keeps it twice more, the product keeps the weight."""
    layer, x = torch.nn.Linear(3, 3).requires_grad_(False), torch.ones(5, 3, requires_grad=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        return y * y * layer.bias

    assert saved.saved_bytes(layer, forward, x) == [5 * 3 * 4]


def test_least_saved_bytes_of_the_7b() -> None:
    """106.5 kB and 159.6 kB for each position of a layer: arithmetic on the published shapes."""
    assert saved.FLOOR == {1: 106_496, 2: 159_616}


def test_peak_bytes_are_those_held_at_once() -> None:
    given = torch.ones(1000)
    with losses.PeakBytes() as counted:
        for _ in range(3):
            made = given + 1  # 4 kB, and while the next is made, another 4 kB
        made.view(10, 100)
    assert counted.peak == 8000


def test_collectives_count_what_their_best_algorithm_sends() -> None:
    assert {name: share(4) for name, share in zero2.SENT.items() if name in ("all_reduce", "reduce")} == {
        "all_reduce": 1.5,
        "reduce": 0.75,
    }
