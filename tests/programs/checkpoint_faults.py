"""Every operation of saving a checkpoint goes wrong, one at a time: FOLDER REPORT.json, under fault_at_syscall.c.

What is there: checkpoint 3, damaged 5 and 9 that the run has passed over, and debris of a kill. Then 5 is saved again
and 3 goes; 9 does not count. Each time a forked child does it with one operation broken; then this process looks.
"""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch
from tiny_bases import qwen2_vl_folder, recipe, whisper_folder

from graft.model.assemble import assemble
from graft.model.lora import add_lora
from graft.model.trainable import select_trainable
from graft.ranks import Ranks, stop
from graft.run_dir import step_folder, verify_checkpoint
from graft.train.checkpoint import Checkpoints, Position, newest, position_of
from graft.train.engine import Engine, resolve_ds_config, start_process_group

COUNT, KILL_BEFORE, KILL_MIDDLE, DISK_FULL, EIO_ONCE = range(5)
STAGE = 2
ROOT = Path(__file__).resolve().parents[2]
folder = Path(sys.argv[1])
run_dir, template = folder / "run", folder / "template"
shim = ctypes.CDLL(None)
shim.fault_log.restype, shim.fault_arm.argtypes = ctypes.c_char_p, (ctypes.c_char_p, ctypes.c_int, ctypes.c_long)


def make(ranks: Ranks) -> Engine:
    made = recipe(whisper_folder(folder / "whisper"), qwen2_vl_folder(folder / "qwen2_vl"))
    model = assemble(made).model
    add_lora(model, made.lora)
    rates = dict.fromkeys(select_trainable(model, STAGE), 0.1)
    settings = made.stage(STAGE)
    config = resolve_ds_config(ROOT / "ds_configs" / "zero2.json", settings, made.run.precision)
    return Engine(model, rates, settings, config, ranks)


@torch.no_grad()
def stir(engine: Engine, seed: int) -> None:
    """Other numbers in everything that a checkpoint holds."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in engine.trained.values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    state = engine.optimizer_state()
    engine.load_optimizer_state({key: torch.rand(t.shape, generator=generator) for key, t in state.items()}, seed)


def save(engine: Engine, step: int) -> Path:
    checkpoints = Checkpoints(run_dir, Ranks(), keep=1, about={"max_steps": 9})
    return checkpoints.save(engine, Position(STAGE, step, first_step=0, num_updates=step))


def contents(of: Path) -> dict[str, bytes]:
    return {str(path.relative_to(of)): path.read_bytes() for path in sorted(of.rglob("*")) if path.is_file()}


def names() -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def restore() -> None:
    shutil.rmtree(run_dir, ignore_errors=True)
    shutil.copytree(template, run_dir)


def in_child(engine: Engine, fault: int, number: int) -> tuple[bool, str]:
    """Save step 5 with the operation broken: whether the child was killed, and what its error said."""
    told = folder / "told.txt"
    told.write_text("")
    pid = os.fork()
    if pid == 0:
        shim.fault_arm(str(run_dir).encode(), fault, number)
        try:
            save(engine, 5)
        except RuntimeError as error:
            told.write_text(str(error))
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status), told.read_text()


def check(engine: Engine, killed: bool, told: str, refuses_to_remove: bool) -> str:
    """What is to be resumed from: "old" or "new", in full; then the next save works and nothing else is left."""
    found = newest(run_dir, STAGE)
    outcome = {3: "old", 5: "new"}[position_of(found).step]
    assert contents(found) == wanted[outcome], f"{found} is a mix"
    if not killed and not refuses_to_remove:
        left = [name for name in names() if name.startswith(".")]
        assert not left, f"left after a failure that was told: {left}"
    if not killed:
        assert outcome == "new" or str(step_folder(run_dir, 5)) in told, f"the message names no checkpoint: {told}"
    save(engine, 7)
    assert names() == ["step-00000007", "step-00000009"], names()
    verify_checkpoint(step_folder(run_dir, 7))
    return outcome


def sweep(engine: Engine, fault: int, numbers: list[int]) -> list[tuple[int, str, str]]:
    """For each operation: its number, what is to be resumed from, what the error said."""
    seen = []
    for number in numbers:
        restore()
        killed, told = in_child(engine, fault, number)
        assert killed == (fault in (KILL_BEFORE, KILL_MIDDLE)), f"operation {number}: killed {killed}"
        try:
            seen.append((number, check(engine, killed, told, kinds[number - 1] == "remove"), told))
        except Exception as error:
            raise AssertionError(f"fault {fault} at operation {number}, {operations[number - 1]}") from error
    return seen


engine = make(start_process_group(timeout_s=60, start_timeout_s=60))
for step in (3, 5):
    stir(engine, step)
    shutil.copytree(save(engine, step), template / "checkpoints" / f"step-{step:08d}")
moments = engine.optimizer_state()
engine.optimizer_state = lambda: moments  # a forked child has no threads to gather them with: gathered already
passed_over = template / "checkpoints" / "step-00000005"
wanted = {"old": contents(template / "checkpoints" / "step-00000003"), "new": contents(passed_over)}
(passed_over / "optimizer.safetensors").write_bytes(b"cut")
shutil.copytree(passed_over, template / "checkpoints" / "step-00000009")
debris = template / "checkpoints" / ".step-00000004.tmp"
(debris / "adapter").mkdir(parents=True)
(debris / "adapter" / "half").write_bytes(b"half")

restore()
shim.fault_arm(str(run_dir).encode(), COUNT, 0)
saved = save(engine, 5)
operations = [line.split("\t") for line in shim.fault_log().decode().splitlines()]
shim.fault_arm(b"", COUNT, 0)
assert contents(saved) == wanted["new"], "the same tensors must make the same bytes"
modes = {oct(path.stat().st_mode & 0o777) for path in saved.rglob("*") if path.is_file()}

kinds = [kind for kind, _, _ in operations]
everything = range(1, len(operations) + 1)
growing = [n for n in everything if kinds[n - 1] in ("open", "write", "mkdir", "resize")]  # a full disk refuses these
written = [n for n in everything if kinds[n - 1] == "write"]
removals = [n for n in everything if kinds[n - 1] == "remove"]
report = {
    "operations": operations,
    "sizes": {name: len(data) for name, data in wanted["new"].items()},
    "modes": sorted(modes),
    "killed before": sweep(engine, KILL_BEFORE, everything),
    "killed in the middle of a write": sweep(engine, KILL_MIDDLE, written),
    "disk full from here on": sweep(engine, DISK_FULL, growing),
    "fails once": sweep(engine, EIO_ONCE, [*sorted({*everything} - {*removals}), *removals[::5]]),
}
Path(sys.argv[2]).write_text(json.dumps(report))
engine.close()
stop()
