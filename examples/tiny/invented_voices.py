"""Invented espeak-ng variants: random formants, pitch, roughness and breath, for more voices than espeak-ng brings.

A recogniser that has heard only the sixty-odd named variants knows those, not voices. Each number names one invented
voice, the same on every machine; the ranges are somewhat wider than those of the named variants.
"""

from __future__ import annotations

import subprocess
from functools import lru_cache
from pathlib import Path
from random import Random

PREFIX = "invented"
NUM_FORMANTS = 9
ENGLISH_DATA = ("phontab", "phonindex", "phondata", "phondata-manifest", "intonations", "en_dict", "lang")


def invented(number: int) -> str:
    """The variant name of invented voice ``number``, 0 and up."""
    return f"{PREFIX}{number}"


def is_invented(variant: str) -> bool:
    return variant.startswith(PREFIX)


def describe(variant: str) -> str:
    """The text of an invented variant's file, in the format of espeak-ng's docs/voices.md."""
    rng = Random(variant)
    low = round(70 * 3 ** rng.random())  # Hz; 70 to 210 on a logarithmic scale, men to children
    lines = ["language variant", f"name {variant}", f"pitch {low} {round(low * rng.uniform(1.15, 1.9))}"]
    lines += formants(rng)
    lines += [f"flutter {rng.randint(0, 6)}", f"roughness {rng.choice([0, 0, 1, 2, 3])}"]
    lines += [f"voicing {rng.randint(35, 120)}", f"consonants {rng.randint(40, 130)} {rng.randint(20, 110)}"]
    if rng.random() < 0.3:
        lines.append(f"echo {rng.randint(10, 140)} {rng.randint(5, 50)}")
    if rng.random() < 0.3:
        lines.append("breath " + " ".join(str(rng.randint(0, 6)) for _ in range(8)))
    if rng.random() < 0.5:
        lines.append(f"intonation {rng.randint(1, 4)}")
    if rng.random() < 0.6:
        loudness = rng.randint(12, 30)
        lines.append("stressAmp " + " ".join(str(loudness + rng.randint(-5, 5)) for _ in range(8)))
    if rng.random() < 0.6:
        lines.append("stressAdd " + " ".join(str(rng.randint(-20, 60)) for _ in range(8)))
    return "\n".join(lines) + "\n"


def formants(rng: Random) -> list[str]:
    """Frequency, strength and width of every formant, in per cent of the accent's own."""
    throat = 0.82 * (1.4 / 0.82) ** rng.random()  # a child's vocal tract is shorter: all resonances lie higher
    lines = []
    for index in range(NUM_FORMANTS):
        frequency = rng.uniform(80, 125) if index == 0 else 100 * throat * rng.uniform(0.9, 1.12)
        audible = index < 3 or rng.random() < 0.8
        strength = rng.uniform(55, 165) if audible else rng.uniform(0, 40)
        lines.append(f"formant {index} {frequency:.0f} {strength:.0f} {rng.uniform(70, 180):.0f}")
    return lines


@lru_cache(maxsize=1)
def installed_data() -> Path:
    """Where espeak-ng keeps its data."""
    version = subprocess.run(["espeak-ng", "--version"], check=True, capture_output=True, text=True).stdout
    return Path(version.split("Data at:")[1].strip())


def prepare(variant: str, folder: Path) -> dict[str, str]:
    """Make ``folder`` a data folder with this one variant, and return what espeak-ng's environment needs to use it.

    One variant a folder: espeak-ng gives up where it finds more than 350 voices.
    """
    for name in ENGLISH_DATA:
        (folder / name).symlink_to(installed_data() / name)
    variants = folder / "voices" / "!v"
    variants.mkdir(parents=True)
    (variants / variant).write_text(describe(variant))
    return {"ESPEAK_DATA_PATH": str(folder)}
