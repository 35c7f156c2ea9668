"""What we claim about speed and waste, measured here and now: ``make bench``.

    python -m benchmarks            # all
    python -m benchmarks padding    # one

Counts are exact on any machine. Times are taken in turns with what they are compared with, in one process, and only
their ratio is told: machines differ, and are noisy.
"""

from __future__ import annotations

import sys

from benchmarks import padding, planning, reading

BENCHMARKS = {"padding": padding.report, "planning": planning.report, "reading": reading.report}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all of them."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"error: no benchmark {', '.join(unknown)}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    for name in names or BENCHMARKS:
        print(f"── {name}")
        for line in BENCHMARKS[name]():
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
