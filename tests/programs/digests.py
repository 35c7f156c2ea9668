"""Digests of everything that two starts of one recipe must agree on: FOLDER SECONDS_THE_CLOCK_IS_WRONG."""

import json
import sys
import time
from hashlib import sha256
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

clock, error_s = time.time, float(sys.argv[2])
time.time = lambda: clock() + error_s
time.time_ns = lambda: int(time.time() * 1e9)

import torch
from test_precompute import StubEncoder, corpus, files, recipe

from graft.data.augment import mask_frames, shift_frames
from graft.data.plan import Plan, cut_step, rank_share
from graft.ranks import Ranks
from graft.train.claim import settings_that_matter
from shards.precompute import precompute


def digest(value: object) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()


folder = Path(sys.argv[1])
settings = recipe(corpus(folder / "corpus", count=9), folder / "sets")
precompute(settings, "train", StubEncoder(), Ranks())
costs = [3 + 7 * n % 11 for n in range(53)]
plan = Plan(
    costs, seed=5, global_batch_size=7, shuffle_pool=20, micro_batch_tokens=40, names=[f"u{n}" for n in range(53)]
)
steps = [[int(i) for i in plan.step(number)[1]] for number in range(17)]
shares = [rank_share(cut_step(step, costs, 4, 40), costs, Ranks(1, 2)) for step in steps]
masked = [mask_frames(torch.ones(31, 2), 3, 5, (5, step, 4)).tolist() for step in range(6)]
shifted = [shift_frames(torch.ones(31, 2), 5, (5, step, 4)).tolist() for step in range(6)]
ours = settings_that_matter(settings, 2)
del ours["data"]["manifests"]  # another folder each time
print(
    json.dumps(
        {
            "plan": digest(steps),
            "micro-batches": digest(shares),
            "masks": digest(masked),
            "shifts": digest(shifted),
            "settings": digest(ours),
            "shards": {name: sha256(data).hexdigest() for name, data in files(folder / "sets" / "train").items()},
            "hash of a word": hash("word"),
            "local time": time.localtime(0).tm_hour,
            "year": time.gmtime(time.time()).tm_year,
        }
    )
)
