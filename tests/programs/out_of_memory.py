"""A command whose reading ahead needs more memory than its process may have."""

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from graft import command
from graft.data.loader import Prefetcher
from graft.ranks import Ranks

ALLOWED = 1 << 30  # bytes beyond what is taken now


def main(_: object) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + ALLOWED, taken + ALLOWED))

    def read(item: int) -> bytearray:
        return bytearray(2 * ALLOWED if item == 2 else 7)

    with Prefetcher(read, range(5)) as ready:
        Ranks().together(lambda: [print(f"item of {len(item)} bytes") for item in ready])


command.run(main, command.parser(__doc__))
