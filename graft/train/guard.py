"""Before the first step: every rank is about to train the same thing, or none begins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from graft.data.prompt import PromptTemplate
from graft.differences import differences
from graft.ranks import AgreedValueError, Ranks
from graft.train.feed import Feed

MOST_TOLD = 20


def inputs_of(feed: Feed) -> dict[str, Any]:
    """What a rank reads and how it dresses it: equal digests mean equal utterances, lengths, texts and prompts.

    ``utterances`` are those of an epoch, per set of the mixture.
    """
    entries = feed.source.entries
    return {
        "utterances": [f"{part.num_uses} of {part.size}" for part in feed.plan.parts],
        "utterances_digest": digest(f"{e.id}\t{c}\t{e.text}" for e, c in zip(entries, feed.costs, strict=True)),
        "prompt_digest": digest(map(str, prompt_ids(feed.template))),
    }


def prompt_ids(template: PromptTemplate) -> Iterator[int]:
    """Every id that the tokenizer and the chat template put around the audio and the text."""
    return iter((*template.before_ids, template.audio_token_id, *template.after_ids, *template.end_ids))


def digest(lines: Iterable[str]) -> str:
    """Twelve characters that change when a line or their order does."""
    whole = hashlib.sha256()
    for line in lines:
        whole.update(f"{line}\n".encode())
    return whole.hexdigest()[:12]


def check_alike(what: Mapping[str, Any], ranks: Ranks) -> None:
    """Refuse to train when a rank differs from rank 0, in settings, versions, data or trained names.

    Raises:
        AgreedValueError: on every rank; names the ranks and what differs.
    """
    everyone = ranks.gather(dict(what))
    told = [
        f"  rank {rank}: {key} is {theirs!r}, on rank 0 {first!r}"
        for rank, other in enumerate(everyone)
        for key, first, theirs in differences(everyone[0], other)
    ]
    if told:
        more = [f"  and {len(told) - MOST_TOLD} more"] if len(told) > MOST_TOLD else []
        raise AgreedValueError(
            "\n".join(["the ranks would not train the same:", *told[:MOST_TOLD], *more])
            + "\nGive every node the same code, environment, recipe and shards."
        )
