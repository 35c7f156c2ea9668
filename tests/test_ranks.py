"""Ranks as a value: alone in this process; two real ones in ``programs/two_ranks.py``."""

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Command, free_port

from graft.ranks import LAUNCHERS, AgreedValueError, Ranks, fair_share

IN_A_STEP = {"SLURM_STEP_NUM_TASKS": "7"}


def test_alone() -> None:
    ranks = Ranks()
    assert ranks.is_first and ranks.sum([3, 1.5]) == [3.0, 1.5] and ranks.gather("a") == ["a"]
    ranks.agree(None)
    with pytest.raises(AgreedValueError, match="^no good$"):
        ranks.agree(ValueError("no good"))
    with pytest.raises(RuntimeError, match="KeyError: 'x'"):
        ranks.agree(KeyError("x"))


def test_work_together() -> None:
    """A path that is not there is the user's fault, a full disk the machine's."""
    ranks = Ranks()
    assert ranks.together(lambda: 3) == 3 and ranks.by_first(lambda: 4) == 4
    assert Ranks(rank=1, world_size=1).by_first(lambda: 4) is None
    with pytest.raises(AgreedValueError, match="No such file .*nowhere"):
        ranks.together(Path("/nowhere").read_text)

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match="No space left"):
        ranks.by_first(fail)


@pytest.mark.parametrize(("hosts", "rank", "share"), [("a", 0, 9), ("abb", 0, 9), ("baaa", 2, 3), ("a" * 20, 7, 1)])
def test_only_ranks_of_the_same_machine_share_its_cores(hosts: str, rank: int, share: int) -> None:
    assert fair_share(9, list(hosts), rank) == share


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1"}, Ranks(3, 5, 1)),
        ({**IN_A_STEP, "SLURM_PROCID": "2", "SLURM_LOCALID": "2"}, Ranks(2, 7, 2)),
        ({**IN_A_STEP, "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "SLURM_PROCID": "0"}, Ranks(1, 2, 1)),
        ({"SLURM_NTASKS": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, Ranks(0, 1, 0)),  # in a batch script
        ({f"OMPI_COMM_WORLD_{name}": "5" for name in ("RANK", "SIZE", "LOCAL_RANK")}, Ranks(5, 5, 5)),
        ({}, Ranks(0, 1, 0)),
    ],
)
def test_from_environment(environment: dict, expected: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    in_environment(environment, monkeypatch)
    assert Ranks.from_environment() == expected


@pytest.mark.parametrize(("gpus", "device"), [(4, "cuda:3"), (1, "cuda:0")])
def test_a_task_of_slurm_may_see_its_own_gpu_alone(gpus: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_environment({**IN_A_STEP, "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}, monkeypatch)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert str(Ranks.from_environment().device()) == device


def in_environment(environment: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """This and nothing else of a launcher's or Slurm's."""
    for name in (name for names in LAUNCHERS for name in names):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_two_ranks(run_launcher: Command, tmp_path: Path) -> None:
    """Sums, and an error on one of them that both raise; the program writes what each rank saw."""
    run_launcher(ROOT / "tests" / "programs" / "two_ranks.py", tmp_path)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank in seen:
        assert rank["threads"] == 3 and rank["threads_as_set"] == 7, "7 cores for two, unless the user has shared them"
        assert rank["sum"] == [3.0, 30.0] and rank["gathered"] == ["rank 0", "rank 1"] and rank["differing"] == [1]
        assert "rank 1: versions.torch is '2.12.0', on rank 0 '2.13.0'" in rank["guard"]
        assert "rank 1: trained.projector.weight is None, on rank 0 [3, 4]" in rank["guard"]
        assert rank["agreed"] == "bad audio (rank 1 of 2)" and rank["kind"] == "AgreedValueError"


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_meet_anew(run_python: Command, tmp_path: Path) -> None:
    """Its store still holds what those before them have said."""
    words = ["--nproc-per-node=2", "--max-restarts=1", f"--master-port={free_port()}"]
    script = Path(sys.executable).with_name("torchrun")
    run_python(script, *words, ROOT / "tests" / "programs" / "fails_once.py", tmp_path, timeout_s=200)
    met = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert met == {f"attempt {attempt}, rank {rank}": "[3.0]" for attempt in range(2) for rank in range(2)}
