"""How near the audio embeddings come to the words that are said: a loss for the projector that needs no language model.

The language model reads embeddings of its own words. Which audio token belongs to which word nobody says, so all ways
to lay the words along the audio count, as in CTC (Graves et al., 2006): each audio token is compared with the rows of
the embedding matrix, and between two words there may be pauses. A pause is the row of a single space. Beside that, each
audio embedding is drawn to the mixture of rows that it is most like: so it gets their size, and not their direction
alone. In that mixture a row has its place by the logarithm of its share: what was perhaps said instead, at a hundredth
of the likeliest, is still there for the language model to see, which may know that the likeliest cannot be. Each word
is told from the others of its micro-batch: the whole vocabulary would cost what the layers do. On a GPU, torch's CTC
reads the lengths and copies them back: the host waits for it, forward and backward.

B: utterances    A: audio tokens    H: hidden size    K: words, the pause first    U: words of the longest transcript
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

AUDIBLE = 8.0  # nats behind the likeliest, where a row has no part in the mixture any more
LEAST_SIZE = 0.1  # of an embedding that has a direction, in rows
SHARPNESS = 16.0  # of the softmax over cosines; left free to learn, it stays between 14 and 18


def alignment_loss(
    audio_embeds: torch.Tensor,
    num_audio_tokens: torch.Tensor,
    rows: torch.Tensor,
    spoken: torch.Tensor,
    num_spoken: torch.Tensor,
) -> torch.Tensor:
    """The loss of each utterance, (B,) in fp32: so many nats, as a sum over its words.

    Args:
        audio_embeds: (B, A, H), of which the first ``num_audio_tokens`` (B,) of each utterance are real.
        rows: (K, H) of the embedding matrix, the pause's first.
        spoken: (B, U) numbers of rows, of which the first ``num_spoken`` (B,) count. More words than audio tokens can
            hold give no loss of order, only that of size. No word at all means that nobody knows, and gives no loss.
    """
    audio_embeds, rows = audio_embeds.float(), rows.float()
    cosines = directions(audio_embeds, rows) @ F.normalize(rows, dim=-1).T
    log_shares = F.log_softmax(SHARPNESS * cosines, dim=-1)  # (B, A, K)
    order = F.ctc_loss(
        log_shares.transpose(0, 1), spoken, num_audio_tokens, num_spoken, reduction="none", zero_infinity=True
    )
    mixtures = _parts(log_shares.detach()) @ rows
    apart = (audio_embeds - mixtures).square().mean(-1) / rows.var()  # (B, A)
    real = torch.arange(apart.shape[1], device=apart.device) < num_audio_tokens.unsqueeze(1)
    return torch.where(num_spoken > 0, order + num_spoken * (apart * real).sum(1) / num_audio_tokens, 0.0)


def directions(audio_embeds: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``audio_embeds`` (B, A, H) at size 1; those much smaller than a row stay so, and are like none.

    Silence of zeros can have an embedding of zeros: divided by its own size it would have a gradient beyond measure.
    """
    size = torch.linalg.vector_norm(audio_embeds, dim=-1, keepdim=True)
    return audio_embeds / torch.maximum(size, LEAST_SIZE * torch.linalg.vector_norm(rows, dim=-1).mean())


def _parts(log_shares: torch.Tensor) -> torch.Tensor:
    """Parts (..., K) of rows in a mixture: most has the likeliest, the others less by the logarithm of their share."""
    behind = log_shares.amax(-1, keepdim=True) - log_shares
    parts = (1 - behind / AUDIBLE).clamp(min=0)
    return parts / parts.sum(-1, keepdim=True)
