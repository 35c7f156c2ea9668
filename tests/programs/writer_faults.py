"""Every file operation of the writers goes wrong once: FOLDER REPORT.json WRITER..., under fault_at_syscall.c.

A writer is a class below: ``prepare`` makes what is there before, ``write`` is what a forked child does with one
operation broken, ``check`` looks at what is left and does it again.
"""

import ctypes
import json
import os
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from test_precompute import StubEncoder, corpus, files, recipe

from graft.data.shard_format import FeatureSet
from graft.evaluation.evaluate import Evaluation
from graft.evaluation.report import write_evaluation
from graft.ranks import Ranks
from graft.recipe import Recipe
from graft.tracker import Tracker
from graft.train.claim import claim
from shards.precompute import precompute

COUNT, KILL_BEFORE, KILL_MIDDLE, DISK_FULL, EIO_ONCE = range(5)
folder = Path(sys.argv[1])
target = folder / "target"
shim = ctypes.CDLL(None)
shim.fault_log.restype, shim.fault_arm.argtypes = ctypes.c_char_p, (ctypes.c_char_p, ctypes.c_int, ctypes.c_long)


class Shards:
    """Five utterances in two shards, encoded and merged."""

    def __init__(self) -> None:
        manifest = corpus(folder / "corpus", count=5)
        self.settings = recipe(manifest, target)
        precompute(self.settings, "train", StubEncoder(), Ranks())
        self.expected = files(target / "train")

    def prepare(self) -> None:
        target.mkdir()

    def write(self) -> None:
        precompute(self.settings, "train", StubEncoder(), Ranks())

    def check(self) -> str:
        try:
            FeatureSet.open(target / "train")
            outcome = "new"
            assert files(target / "train") == self.expected, "a set that opens is not the whole set"
        except ValueError:
            outcome = "old"
        self.write()
        assert files(target / "train") == self.expected
        return outcome


class Metrics:
    """A run of four steps that is resumed at step 3 and logs two more."""

    def prepare(self) -> None:
        self._log(None, range(1, 5), 1.0)

    def write(self) -> None:
        self._log(3, range(3, 5), 2.0)

    def check(self) -> str:
        found = self._read()
        before, after = [(n, 1.0) for n in (1, 2, 3, 4)], [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
        assert found in (before, after[:2], after[:3], after), found
        self.write()
        assert self._read() == after
        return "new" if found == after else "old"

    def _log(self, resume_step: int | None, steps: range, loss: float) -> None:
        tracker = Tracker(target, resume_step)
        for step in steps:
            tracker.scalars(step, {"train/loss": loss})
            tracker.utterances(step, [f"u{step}"])
        tracker.close()

    def _read(self) -> list[tuple[int, float]]:
        """Whole lines; what follows the last newline is a line that a kill has cut."""
        lines = map(json.loads, (target / "metrics.jsonl").read_text().split("\n")[:-1])
        return [(line["step"], line["train/loss"]) for line in lines]


class Settings:
    """The run directory claimed once more, for stage 2."""

    def prepare(self) -> None:
        self._claim(1)
        (target / "checkpoints" / "step-00000003").mkdir(parents=True)  # it has trained: whose it is matters

    def write(self) -> None:
        self._claim(2)

    def check(self) -> str:
        for name in ("recipe.yaml", "run.json", "ds_config.json", "versions.json"):
            assert (target / name).read_text().endswith(("\n", "}")), f"{name} is cut"
        claimed = json.loads((target / "run.json").read_text())
        assert list(claimed) in (["1"], ["1", "2"])
        self._claim(1)  # the same run still: no other has it
        self.write()
        return "new" if "2" in claimed else "old"

    def _claim(self, stage: int) -> None:
        claim(target, Recipe(bases={"whisper": "w", "qwen2_vl": "q"}), stage, {"zero_optimization": {"stage": 2}})


class Scores:
    """An evaluation over an older one."""

    def prepare(self) -> None:
        self._write(0.5)

    def write(self) -> None:
        self._write(0.25)

    def check(self) -> str:
        whole, outcome = (target / "summary.json").is_file(), "old"
        if whole:
            wer = json.loads((target / "summary.json").read_text())["wer"]
            lines = [json.loads(line) for line in (target / "hypotheses.jsonl").read_text().splitlines()]
            assert [line["wer"] for line in lines] == [wer] * 2, "a summary beside lines of another evaluation"
            outcome = "new" if wer == 0.25 else "old"
        self.write()
        return outcome

    def _write(self, wer: float) -> None:
        lines = [{"id": f"u{n}", "text": "a", "pred_text": "b", "wer": wer} for n in range(2)]
        write_evaluation(target, Evaluation({"wer": wer}, lines))


def restore(writer: object) -> None:
    shutil.rmtree(target, ignore_errors=True)
    writer.prepare()


def in_child(writer: object, fault: int, number: int) -> tuple[bool, str]:
    """Write with the operation broken: whether the child was killed, and what its error said."""
    told = folder / "told.txt"
    told.write_text("")
    pid = os.fork()
    if pid == 0:
        shim.fault_arm(str(target).encode(), fault, number)
        try:
            writer.write()
        except Exception as error:
            told.write_text(f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status), told.read_text()


def operations_of(writer: object) -> list[list[str]]:
    """Kind, path and bytes of each operation of an undisturbed ``write``, made by a child like all others."""
    restore(writer)
    log = folder / "log.txt"
    pid = os.fork()
    if pid == 0:
        shim.fault_arm(str(target).encode(), COUNT, 0)
        writer.write()
        log.write_bytes(shim.fault_log())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    return [line.split("\t") for line in log.read_text().splitlines()]


def sweep(writer: object, fault: int, numbers: list[int]) -> list[dict]:
    seen = []
    for number in numbers:
        restore(writer)
        killed, told = in_child(writer, fault, number)
        left = sorted(str(path.relative_to(target)) for path in target.rglob(".*.tmp"))
        try:
            outcome = writer.check()
        except Exception as error:
            raise AssertionError(f"{type(writer).__name__}: fault {fault} at operation {number}") from error
        seen.append({"number": number, "killed": killed, "told": told, "left": left, "outcome": outcome})
    return seen


WRITERS = {"shards": Shards, "metrics": Metrics, "settings": Settings, "scores": Scores}
report = {}
for name in sys.argv[3:]:
    writer = WRITERS[name]()
    operations = operations_of(writer)
    kinds = [kind for kind, _, _ in operations]
    everything = list(range(1, len(operations) + 1))
    growing = [
        n for n in everything if kinds[n - 1] in ("open", "write", "mkdir", "resize")
    ]  # a full disk refuses these
    report[name] = {
        "operations": operations,
        "killed before": sweep(writer, KILL_BEFORE, everything),
        "killed in the middle of a write": sweep(
            writer, KILL_MIDDLE, [n for n in everything if kinds[n - 1] == "write"]
        ),
        "disk full from here on": sweep(writer, DISK_FULL, growing),
    }
Path(sys.argv[2]).write_text(json.dumps(report))
