"""What a training writes and where: one folder, both stages, finished files only.

    recipe.yaml  ds_config.json  versions.json  run.json     what was run (run.json also tells whose folder this is)
    metrics.jsonl  tensorboard/  utterances.jsonl            what happened
    checkpoints/step-00000120/                               projector.safetensors  adapter/  optimizer.safetensors
                                                             state.json  files.json
    checkpoints/evaluations.json                             {"1": {"120": 0.04}}: WER by stage and step
    eval/<split>/summary.json  hypotheses.jsonl
    .lock                                                    held by the training that goes on here

A checkpoint is written under a temporary name, forced to disk and renamed; ``files.json`` holds the digest of every
file, so that a folder of that name is whole or does not count. One that goes is first renamed too: what a kill leaves
has a name that begins with a dot, counts for nothing, and is gone after the next checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_STEP_FOLDER = re.compile(r"step-(\d{8})")
STATE_FILE, FILES_FILE, EVALUATIONS_FILE = "state.json", "files.json", "evaluations.json"
TRIMMED = "-trimmed"  # behind an encoder's fingerprint where features were made with audio.window=trimmed


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` stands."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps that have a whole checkpoint, ascending."""
    folder = run_dir / "checkpoints"
    matches = (_STEP_FOLDER.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in matches if match and (folder / match[0] / FILES_FILE).is_file())


def read_evaluations(run_dir: Path) -> dict[int, dict[int, float]]:
    """Word error rates of the evaluations that were finished: stage -> step -> WER."""
    path = run_dir / "checkpoints" / EVALUATIONS_FILE
    try:
        stages = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return {int(stage): {int(step): float(wer) for step, wer in wers.items()} for stage, wers in stages.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Without that file the newest checkpoint is taken") from error


def best_steps(run_dir: Path) -> dict[int, int]:
    """The step of lowest word error rate of each stage, among those that have a whole checkpoint."""
    whole, best = set(checkpoint_steps(run_dir)), {}
    for stage, wers in read_evaluations(run_dir).items():
        scored = [(wer, step) for step, wer in wers.items() if step in whole]
        if scored:
            best[stage] = min(scored)[1]
    return best


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that ``path`` means: itself, or a run's best by word error rate, or its newest.

    Raises:
        ValueError: if there is none; never a silent fresh start.
    """
    path = Path(path)
    if (path / FILES_FILE).is_file():
        return path
    best, evaluations = best_steps(path), read_evaluations(path)
    if best:  # one of each stage; of equals the later stage's
        stage = min(best, key=lambda stage: (evaluations[stage][best[stage]], -stage))
        return step_folder(path, best[stage])
    if steps := checkpoint_steps(path):
        return step_folder(path, steps[-1])
    looked = f"{path / FILES_FILE} and {path / 'checkpoints' / 'step-*' / FILES_FILE}"
    what = "holds no whole checkpoint" if path.is_dir() else "does not exist"
    raise ValueError(f"{path} {what}: looked for {looked}")


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint."""
    return json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))


def window_of(fingerprint: str) -> str:
    """``audio.window`` of the features that an encoder's fingerprint stands for: ``full`` or ``trimmed``."""
    return "trimmed" if TRIMMED in fingerprint else "full"


def check_encoder(checkpoint: Path, fingerprint: str) -> None:
    """Refuse a projector that was trained on another encoder's features: it would be deaf to this one's.

    Raises:
        ValueError: if ``fingerprint`` is not that of the encoder that ``checkpoint`` was trained on.
    """
    trained_on = read_state(checkpoint)["encoder_fingerprint"]
    there, here = window_of(trained_on), window_of(fingerprint)
    if there != here:
        raise ValueError(
            f"{checkpoint} was trained on features of audio.window={there}, the recipe has audio.window={here}: "
            f"set audio.window={there}, or train stage 1 again"
        )
    if trained_on != fingerprint:
        raise ValueError(
            f"{checkpoint} was trained on features of another encoder (fingerprint {trained_on[:12]}, the recipe's "
            f"bases.whisper has {fingerprint[:12]}): use that encoder, or train stage 1 again"
        )


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint stands in."""
    return checkpoint.resolve().parents[1]


def verify_checkpoint(checkpoint: Path) -> None:
    """Compare every file of a checkpoint with its digest.

    Raises:
        ValueError: if a file is missing or differs, with its name.
    """
    try:
        listed = dict(json.loads((checkpoint / FILES_FILE).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint / FILES_FILE} is damaged: {error}; take an older checkpoint") from error
    for name, expected in listed.items():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"checkpoint {checkpoint} has lost {name}: take an older one")
        if digest(file) != expected:
            raise ValueError(f"{file} is damaged: its sha256 is not the one in {FILES_FILE}; take an older one")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill; it becomes ``folder``, digests added, when everything in it is on the disk.

    A ``folder`` that is there already stays until then. Between two renames there is neither: a run replaces no
    checkpoint but those it has passed over, and goes on from an older one then.
    """
    temporary, aside = _hidden(folder, "tmp"), _hidden(folder, "old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _seal(temporary)
        shutil.rmtree(aside, ignore_errors=True)
        if folder.exists():
            os.rename(folder, aside)
        os.rename(temporary, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists() and not folder.exists():
            os.rename(aside, folder)
        shutil.rmtree(aside, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint: at once by name, then file by file, so that no half of one is ever taken for a whole.

    Raises:
        OSError: if it could not be removed; names the folder.
    """
    aside = _hidden(folder, "old")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        os.rename(folder, aside)
        shutil.rmtree(aside)
    except OSError as error:
        raise OSError(f"{folder} could not be removed: {error}") from error


def clear_debris(run_dir: Path) -> None:
    """Remove what a kill has left of checkpoints that were being written or removed."""
    for path in (run_dir / "checkpoints").glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def take_lock(path: Path) -> int | None:
    """Lock ``path``, which is made: a descriptor to close, after which it is free; None where another process has it.

    The lock goes with the process that holds it, killed or not. Where a file system knows no locks, nobody is kept out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            os.close(descriptor)
            raise
    return descriptor


def write_whole(path: Path, text: str) -> None:
    """Write a file that is either the old one or the new one, never a part.

    Raises:
        OSError: if it could not be written; names ``path``, and what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(path, "tmp")
    try:
        with naming(path):
            temporary.write_text(text, encoding="utf-8")
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give the system's errors a file's name: those of writing and forcing to disk, such as a full disk, have none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hidden(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


def _seal(folder: Path) -> None:
    """Add the digests of all files, and force everything to disk."""
    inside = sorted(folder.rglob("*"))
    files = [path for path in inside if path.is_file()]
    digests = {str(path.relative_to(folder)): digest(path) for path in files}
    write_whole(folder / FILES_FILE, json.dumps(digests, indent=2) + "\n")
    mode = (folder / FILES_FILE).stat().st_mode
    for file in files:
        file.chmod(mode)  # safetensors makes files that nobody else can read, whatever the umask says
    for path in (*inside, folder):
        _sync(path)
