"""Every phase of one recipe, by the real launcher: precompute, verify, stage 1, stage 2, evaluate.

    python launch/quickstart.py
    python launch/quickstart.py recipes/digits.yaml run.dir=runs/my-digits

Uses the GPUs it finds, else two CPU ranks. Phases that are done are not done again; <run.dir>/summary.json holds the
result, <run.dir>/logs/ all that was said.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "graft").is_dir():
    sys.path[0] = str(ROOT)  # a clone: this folder comes first, where evaluate.py would hide a package of that name

import torch
from rich.console import Console
from rich.table import Table

from graft import command
from graft.ranks import on_gpu
from graft.recipe import Recipe, load_recipe
from graft.run_dir import write_whole

CPU_RANKS = 2
NOISE = re.compile(r"^\[\d{4}-\d\d-\d\d |^DeepSpeed .* built|Warning: |^\s+(return func|warnings\.warn)|^\[W|^\[Gloo\]")


@dataclass
class Phase:
    """One command of the way; ``ranks`` 0 means plain python, ``folder`` where it runs (None: here)."""

    name: str
    ranks: int
    words: list[str]
    folder: Path | None = None


def main(arguments: argparse.Namespace) -> int:
    """Run the phases; 0, or the exit code of the one that failed."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run_dir = Path(recipe.run.dir)
    ranks = number_of_ranks(recipe)
    seconds: dict[str, float] = {}
    for phase in phases(recipe, arguments, ranks):
        print(f"\n── {phase.name}", flush=True)
        started = time.monotonic()
        code = run(phase, run_dir / "logs" / f"{phase.name.replace(' ', '-')}.log")
        seconds[phase.name] = round(time.monotonic() - started, 1)
        if code:
            return code
    summary = summarise(recipe, ranks, seconds)
    write_whole(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    show(summary, run_dir)
    return command.DONE


def number_of_ranks(recipe: Recipe) -> int:
    """The GPUs of this machine, or two ranks on its CPU; never more than a step of the recipe has micro-batches."""
    there = torch.cuda.device_count() if on_gpu() else CPU_RANKS
    return min(there, recipe.stage1.micro_batches, recipe.stage2.micro_batches)


def phases(recipe: Recipe, arguments: argparse.Namespace, ranks: int) -> Iterator[Phase]:
    """The commands a user would type, in order."""
    words = [str(arguments.recipe), *arguments.overrides]
    for preparation in recipe.prepare:
        if not (ROOT / preparation.makes).exists():
            script, *rest = preparation.run
            yield Phase(f"prepare {Path(preparation.makes).name}", 0, [str(ROOT / script), *rest], ROOT)
    yield Phase("precompute", ranks, [str(ROOT / "shards" / "precompute.py"), *words])
    yield Phase("verify", 0, [str(ROOT / "shards" / "verify.py"), recipe.data.shards])
    for stage in ("1", "2"):
        yield Phase(f"stage {stage}", ranks, [str(ROOT / "launch" / "train.py"), *words, "--stage", stage])
    yield Phase("evaluate", ranks, [str(ROOT / "launch" / "evaluate.py"), *evaluation_words(recipe, arguments)])


def evaluation_words(recipe: Recipe, arguments: argparse.Namespace) -> list[str]:
    """Arguments that score the test split, the base Whisper's own decoder beside the graft.

    As asked now: of a run that is trained already, the recipe stays what it was trained by.
    """
    split = recipe.evaluation.test_split
    words = ["--checkpoint", recipe.run.dir, "--split", split, "--output", str(Path(recipe.run.dir) / "eval" / split)]
    return [*words, "--base-whisper", *arguments.overrides]


def run(phase: Phase, log: Path) -> int:
    """Run a phase, show what is worth reading, keep all of it in ``log``; its exit code."""
    launcher = [deepspeed(), *which_gpus(phase.ranks), "--master_port", str(free_port())]
    line = [*(launcher if phase.ranks else [sys.executable]), *phase.words]
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            line,
            cwd=phase.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(phase.ranks),
        ) as process,
    ):
        for text in process.stdout:
            file.write(text)
            if not NOISE.search(text):
                print(text, end="", flush=True)
    if process.returncode:
        print(f"{phase.name} failed with exit code {process.returncode}; all it said is in {log}", file=sys.stderr)
    return process.returncode


def which_gpus(ranks: int) -> list[str]:
    """The launcher's words for so many ranks on the GPUs that are ours. ``--num_gpus`` would count from GPU 0.

    Raises:
        ValueError: CUDA_VISIBLE_DEVICES has names, and DeepSpeed's launcher knows numbers alone.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if on_gpu() else ""
    if not visible:
        return ["--num_gpus", str(ranks)]
    numbers = [number.strip() for number in visible.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise ValueError(f"CUDA_VISIBLE_DEVICES is {visible}: DeepSpeed's launcher takes numbers alone, such as 0,1")
    return ["--include", f"localhost:{','.join(numbers[:ranks])}"]


def environment(ranks: int) -> dict[str, str]:
    """The ranks of one machine share its cores."""
    quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if on_gpu():
        return os.environ | quiet
    threads = str(max(1, (os.cpu_count() or 1) // max(1, ranks)))
    return os.environ | quiet | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": threads}


def deepspeed() -> str:
    """The launcher that belongs to this Python."""
    beside = Path(sys.executable).with_name("deepspeed")
    found = str(beside) if beside.exists() else shutil.which("deepspeed")
    if not found:
        raise ValueError("the deepspeed launcher is not installed beside this Python: make install")
    return found


def free_port() -> int:
    """A port nobody listens on, so that two runs on one machine do not meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def summarise(recipe: Recipe, ranks: int, seconds: dict[str, float]) -> dict:
    """What the run came to, from the evaluation's own summary."""
    path = Path(recipe.run.dir) / "eval" / recipe.evaluation.test_split / "summary.json"
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    figures = {name: evaluation[name] for name in ("wer", "cer", "wer_swapped", "wer_encoder_base")}
    return {"recipe": recipe.name, **figures, "evaluation": evaluation, "ranks": ranks, "seconds": seconds}


def show(summary: dict, run_dir: Path) -> None:
    """The closing table."""
    rows = {
        "WER, graft": summary["wer"],
        "CER, graft": summary["cer"],
        "WER, graft, another utterance's audio": summary["wer_swapped"],
        "WER, the base Whisper's own decoder": summary["wer_encoder_base"],
    }
    table = Table(title=f"{summary['recipe']}: {summary['evaluation']['num_utterances']} test utterances")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in rows.items():
        table.add_row(name, f"{value:.2%}")
    table.add_section()
    for phase, seconds in summary["seconds"].items():
        table.add_row(phase, f"{seconds:.0f} s")
    table.add_row("all phases", f"{sum(summary['seconds'].values()):.0f} s")
    console = Console()
    console.print(table)
    console.print(f"curves: tensorboard --logdir {run_dir}    transcripts: {run_dir}/eval    all said: {run_dir}/logs")


if __name__ == "__main__":
    parser = command.parser(__doc__)
    parser.add_argument("recipe", type=Path, nargs="?", default=ROOT / "recipes" / "tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.run(main, parser)
