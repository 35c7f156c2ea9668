"""What every command has in common: arguments, logging, exit codes.

Exit codes: 0 done; 1 a fault of ours or of the machine; 2 the user's input or recipe; 75 stopped on request with
all that was done saved (EX_TEMPFAIL of sysexits.h: run the same command again to go on); 130 Ctrl-C elsewhere, as
shells have it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable

from graft.ranks import AgreedValueError, Ranks

DONE, FAULT, USER_ERROR, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130


def parser(docstring: str) -> argparse.ArgumentParser:
    """A parser whose help is the run file's own docstring; it accepts the launcher's ``--local_rank``."""
    made = argparse.ArgumentParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # put there by the deepspeed launcher
    return made


def run(main: Callable[[argparse.Namespace], int | None], arguments: argparse.ArgumentParser) -> None:
    """Parse the command line, run ``main``, exit with its code; the user's faults become one clear line."""
    parsed = arguments.parse_intermixed_args()  # options may stand between recipe and section.key=value words
    ranks = Ranks.from_environment()
    configure_logging(ranks)
    try:
        code = main(parsed) or DONE
    except ValueError as error:
        _explain(error, ranks)
        code = USER_ERROR
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception:
        if ranks.world_size == 1:
            raise
        traceback.print_exc()  # told here and ended below: were it raised, shutdown would wait for the others
        code = FAULT
    sys.stdout.flush()
    sys.stderr.flush()
    if ranks.world_size == 1:
        sys.exit(code)
    # Everything is written and closed. Interpreter shutdown would still wait for a collective that another rank never
    # joins, and has been seen to abort on a communication thread that was still running.
    os._exit(code)


def configure_logging(ranks: Ranks) -> None:
    """Rank 0 tells what happens; the others speak only when something is wrong; libraries stay quiet."""
    level = logging.INFO if ranks.is_first else logging.ERROR
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.ERROR, force=True)
    logging.getLogger("graft").setLevel(level)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "transformers" in sys.modules:  # imported before: it has read its environment already
        transformers_logging = sys.modules["transformers"].utils.logging
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to their authors


def _explain(error: ValueError, ranks: Ranks) -> None:
    if os.environ.get("GRAFT_TRACEBACK"):
        traceback.print_exc()
    if isinstance(error, AgreedValueError) and not ranks.is_first:
        return
    prefix = "" if ranks.is_first else f"[rank {ranks.rank}] "
    print(f"{prefix}error: {error}", file=sys.stderr)
