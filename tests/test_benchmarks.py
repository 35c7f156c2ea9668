"""The benchmarks compute what they say: turns, the rule of agreement, counts by hand, the page made from results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import e2e, encoding, harness, losses, mini, online, ours, report, saved, shapes, steps, zero2
from benchmarks.gpu import __main__ as gpu_command
from benchmarks.gpu import bench, feeding
from benchmarks.harness import Figure, Round, Spent
from graft.data.prompt import IGNORE_INDEX
from graft.recipe import Stage


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


def test_the_busiest_operation_stands_first_with_its_share() -> None:
    large, small = torch.randn(512, 512), torch.randn(8)
    told = harness.busiest(lambda: [large @ large for _ in range(20)] + [small + small], most=1)
    name, share = told.split()
    assert name == "mm" and 50 < int(share.rstrip("%")) <= 100


def test_one_thread_and_then_as_many_as_before() -> None:
    before = torch.get_num_threads()
    assert harness.in_one_thread(torch.get_num_threads)() == 1
    assert torch.get_num_threads() == before


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


def test_flops_executed_by_hand() -> None:
    """Rows of 62 and 61 that share 20: 103 positions up to the last q, k, v; 2 x 30 labels behind them."""
    batch = mini.batch([0, 1], [8, 4], stack_factor=4)
    qkv, rest = 448 * (448 + 64 + 64), 448 * 448 + 3 * 448 * 2368
    flops = 4 * (103 * (7 * qkv + 6 * rest) + 60 * (rest + 448 * 4752))
    assert steps.executed(batch) == pytest.approx(flops * 1e-9)


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


def test_an_hour_of_speech_in_bytes() -> None:
    """360 clips of 500 frames of 1,280 numbers, in int8 with a scale of four bytes a frame, and a header each."""
    sizes = {figure.name.rpartition(".")[2]: figure.value for figure in encoding.bytes_per_hour()}
    assert sizes == {"bfloat16": pytest.approx(460.8, abs=0.05), "int8": pytest.approx(231.12, abs=0.08)}


def test_without_ctranslate2_its_figures_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding.importlib.util, "find_spec", lambda name: None)
    call, reason = encoding.ctranslate2_frames(tmp_path, tmp_path / "made", None)
    assert call is None and reason == "left out: not installed (the extra 'bench' has it)"


def test_parameters_of_the_full_sizes() -> None:
    """Arithmetic on the published shapes, by hand: see the shapes in Qwen2-VL's and Whisper's config.json."""
    assert shapes.SEVEN_B.layer_parameters == 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944) == 6_525_288_448
    assert shapes.SEVEN_B.head_parameters == 544_997_376 and shapes.SEVEN_B.lora_parameters(64) == 161_480_704
    assert shapes.TWO_B.layer_parameters == 1_310_195_712 and shapes.TWO_B.lora_parameters(64) == 73_859_072


@pytest.mark.parametrize(
    ("shape", "positions", "labels", "r", "teraflop"),
    [
        (shapes.SEVEN_B, 185, 30, 0, 4.915),  # a clip of 10 s, stage 1: 185 x 26.1 GF, attention 21, logits 65
        (shapes.SEVEN_B, 185, 30, 64, 5.094),  # stage 2: 0.97 GF more at each position
        (shapes.SEVEN_B, 1560, 30, 0, 42.25),  # the seed's clip
        (shapes.TWO_B, 185, 30, 0, 1.006),
        (shapes.SEVEN_B, 4096, 4096, 16, 126.95),  # the published twin: 31 GF a token
    ],
)
def test_flop_of_a_row(shape: shapes.Shape, positions: int, labels: int, r: int, teraflop: float) -> None:
    assert shape.row_flop(positions, labels, r) / 1e12 == pytest.approx(teraflop, rel=1e-3)


@pytest.mark.parametrize(("frames", "teraflop"), [(1500, 2.274), (1000, 1.434), (500, 0.676)])
def test_flop_of_the_encoder(frames: int, teraflop: float) -> None:
    assert shapes.TURBO.flop(frames) / 1e12 == pytest.approx(teraflop, rel=1e-3)


def test_the_seeds_training_extrapolated() -> None:
    """160,000 clips at 160 a second are 1,000 s, 20,000 at 100 are 200 s: 20 minutes."""
    assert feeding.extrapolated_minutes({1: 160.0, 2: 100.0}) == 20.0


@pytest.mark.parametrize("limit", [0, 1, 2, 17, 63, 64, 99, 100, 400])
def test_the_largest_that_fits_is_found(limit: int) -> None:
    tried: list[int] = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= limit

    found = bench.largest(fits, 1, 100)
    assert found <= limit and min(limit, 100) - found <= 0.03 * found + 1
    assert max(tried) <= 100 and len(tried) <= 14


def test_a_ratio_on_a_gpu_is_of_middle_rounds_and_published_where_the_best_tell_the_same() -> None:
    def rounds(*peer: float) -> list[Round]:
        return [Round({"peer": Spent(wall, 0.0), "ours": Spent(2.0, 0.0)}, Spent(1.0, 1.0)) for wall in peer]

    value, published, _ = bench.ratio(rounds(6, 6.2, 5.9, 7, 6.1), "peer", "ours", weight=0.5)
    assert value == pytest.approx(0.5 * 6.1 / 2) and published
    assert not bench.ratio(rounds(6, 8, 8, 8, 5), "peer", "ours")[1]


def test_a_share_of_the_gemm_is_of_the_same_round() -> None:
    """On a GPU that slows down to a half the share stays what it is, 3 of 6 and 1.5 of 3 TFLOP/s."""
    taken = [Round({"ours": Spent(s, 0.0)}, Spent(g, g)) for s, g in ((1.0, 6e3), (2.0, 3e3), (2.0, 3e3))]
    assert bench.share_of_gemm(taken, "ours", 3e12) == pytest.approx(0.5)


def test_the_seeds_way_is_counted_in_its_own_micro_batches() -> None:
    """24 clips, 8 passes in micro-batches of 8 and 1 in those of 4: 24 and 6 of them; one start, two savings."""
    spent = {
        "seed starts": Spent(5.0, 1.0),
        "seed stage 1": Spent(2.0, 3.0),
        "seed stage 2": Spent(10.0, 20.0),
        "seed saves": Spent(0.5, 0.25),
    }
    assert e2e.whole(spent, 24) == Spent(5 + 24 * 2 + 6 * 10 + 2 * 0.5, 1 + 24 * 3 + 6 * 20 + 2 * 0.25)


def test_a_clip_of_ten_seconds_takes_185_positions_through_the_real_collator() -> None:
    batch = mini.batch([3, 5], [500, 497], stack_factor=4, shape=shapes.SMALL)
    assert batch.input_ids.shape == (2, 185) and batch.num_padding == 0  # 497 frames are 125 tokens too
    assert (batch.input_ids == shapes.SMALL.audio_token).sum(1).tolist() == [125, 125]
    assert batch.num_label_tokens == 60 and batch.input_ids.max() < shapes.SMALL.vocab


def test_a_shared_copy_trains_apart_and_holds_the_frozen_weights_once() -> None:
    model = mini.graft(4, torch.float32, shapes.SMALL)
    other = mini.shared_copy(model)
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    own = {name for name in ours if ours[name] is not theirs[name]}
    assert own == {name for name in ours if "multi_modal_projector" in name} and own
    seeds = mini.restacked(model, 1)
    assert seeds.model.multi_modal_projector.linear_1.in_features == shapes.SMALL.frame_size
    assert model.config.stack_factor == 4 and model.model.multi_modal_projector.linear_1.in_features == 4 * 16


def test_the_plain_engine_steps_as_adamw_does_and_skips_what_is_not_finite() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    engine = ours.PlainEngine(layer, rate=0.1, settings=Stage(max_grad_norm=1.0), precision="fp32")
    before = layer.weight.detach().clone()
    engine.backward(layer(torch.tensor([[3.0, 4.0]])).sum())
    norm, applied = engine.step(0.5)
    assert norm == pytest.approx(5.0) and applied
    assert torch.allclose(layer.weight, before - 0.05)  # Adam's first step is the rate, whatever the gradient
    engine.backward(layer(torch.tensor([[float("nan"), 1.0]])).sum())
    held = layer.weight.detach().clone()
    assert not engine.step(1.0)[1] and torch.equal(layer.weight, held)


def test_a_gpus_results_say_which_gpu(tmp_path: Path) -> None:
    on = {"gpu": "Test GPU", "memory": "3 GiB", "driver": "1.2", "power limit": "700.00 W", "cuda": "13.0", "cores": 5}
    harness.write("gpu.dice", "abc1234", [Figure("dice", 6.0, "x", "pips")], tmp_path, on)
    page = report.write_page(tmp_path, tmp_path / "page.md").read_text()
    assert (
        "`python -m benchmarks.gpu dice` at commit abc1234; Test GPU, 3 GiB, driver 1.2, power limit 700.00 W" in page
    )


def test_without_a_gpu_the_gpu_benchmarks_say_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_command.main([], small=False) == 2 and "--small" in capsys.readouterr().err
    assert gpu_command.main(["step9"], small=True) == 2 and "there are: ceiling, step1.7b" in capsys.readouterr().err


def test_every_gpu_benchmark_runs_small_and_tells_figures() -> None:
    words = [sys.executable, "-m", "benchmarks.gpu", "--small"]
    done = subprocess.run(words, cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told, lines = {}, []
    for line in done.stdout.splitlines():
        if ended := re.match(r"── (\S+): \d+ s, small", line):
            told[ended[1]], lines = lines, []
        elif re.match(r"[\w.]+  \S", line):
            lines.append(line)
    assert list(told) == list(gpu_command.BENCHMARKS)
    assert all(told.values()), {name: len(figures) for name, figures in told.items()}


def test_shards_pay_after_as_many_passes_as_their_making_costs() -> None:
    assert online.after_passes(making=6.0, online=5.0, shards=2.0) == 2.0
    assert online.after_passes(making=6.0, online=2.0, shards=2.0) == float("inf")


def test_passes_are_told_where_both_clocks_agree() -> None:
    spent = {"online": Spent(10.0, 20.0), "shards": Spent(4.0, 8.0), "making shards": Spent(6.0, 12.0)}
    assert online.PASSES == 2
    agreed = online.pays([Round(spent, Spent(1.0, 1.0))] * 5)
    assert (agreed.value, agreed.published) == (2.0, True)
    spent["making shards"] = Spent(6.0, 14.0)
    assert not online.pays([Round(spent, Spent(1.0, 1.0))] * 5).published
