"""Joint decoding: how likely a next word is to the language model, and how likely to what the audio tokens say.

Where the projector was aligned (:mod:`graft.model.alignment`), audio embeddings can be read without the language model,
as CTC. How likely is it that an utterance begins with the words so far, and then with this one? Over all ways to lay
them along the audio, that is CTC's prefix score (Watanabe et al., 2017, "Hybrid CTC/Attention Architecture for
End-to-End Speech Recognition", algorithm 2). The language model knows what people say; the audio does not lose count of
a word that is said three times, and holds a reply that runs away.

Where an audio token begins is arbitrary: of k stacked frames any may be the first. So the audio is read in all k ways,
each beginning a frame later, by both: logarithms of the language model's probabilities, and of what the audio says, are
averaged over them. A batch has k rows of each utterance, which are given the same reply.

B: utterances    R: rows, k of each utterance    A: audio tokens    H: hidden size    C: candidates
V: rows of the embedding matrix
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LogitsProcessor

from graft.data.augment import later
from graft.data.collate import Batch
from graft.data.loader import FeatureSample
from graft.data.prompt import PromptTemplate
from graft.model.alignment import SHARPNESS, directions

CANDIDATES = 32  # for the next token, the language model's likeliest; what is not among them is never said
ROWS_AT_A_TIME = 16_384  # of the embedding matrix, when audio tokens are compared with all of it
# Logarithm of what is impossible: infinities have no differences. An hour of speech comes to -1e6, and of a sum of a
# hundred thousand of these fp64 still keeps hundredths.
LEAST = -1e9


@dataclass(frozen=True)
class Evidence:
    """What the audio tokens of a batch say, each for itself: log shares of the embedding matrix's rows.

    directions: (R, A, H), all utterances in the first of so many ``ways``, then in the next    rows: (V, H)
    whole: (R, A), the logarithm of what all rows have together
    real: (R, A) bool, False behind an utterance's audio, where nothing is said but a pause
    """

    directions: Tensor
    whole: Tensor
    rows: Tensor
    real: Tensor
    pause: int
    ways: int = 1

    @classmethod
    def of(cls, model: nn.Module, batch: Batch, pause: int, ways: int) -> Evidence:
        """The evidence for a batch of :func:`all_ways`, in fp32 whatever the autocast."""
        rows, num_frames = model.get_input_embeddings().weight, batch.audio_feature_lengths
        audio_embeds = model.model.project(batch.audio_features, num_frames)
        with torch.autocast(audio_embeds.device.type, enabled=False):
            where = directions(audio_embeds.float(), rows)
            parts = [_compared(where, part).logsumexp(-1) for part in rows.split(ROWS_AT_A_TIME)]
        num_tokens = model.model.num_audio_tokens(num_frames)
        real = torch.arange(where.shape[1], device=num_tokens.device) < num_tokens.unsqueeze(1)
        return cls(where, torch.stack(parts).logsumexp(0), rows, real, pause, ways)

    def log_shares(self, tokens: Tensor) -> Tensor:
        """(R, C) ids -> (R, A, C) in fp64: sums of hundreds of them are subtracted from each other."""
        with torch.autocast(self.rows.device.type, enabled=False):
            shares = (_compared(self.directions, self.rows[tokens]) - self.whole.unsqueeze(-1)).double()
        behind = torch.where(tokens == self.pause, 0.0, LEAST).double().unsqueeze(1)
        return torch.where(self.real.unsqueeze(-1), shares, behind)


def all_ways(samples: Sequence[FeatureSample], ways: int) -> list[FeatureSample]:
    """``samples`` as they are, then each without its first frame, and so on: ``ways`` times as many.

    Zeros stand behind, so that an utterance keeps its length; of a short one at least half stays, or all of it.
    """
    made = []
    for shift in range(ways):
        for sample in samples:
            features = sample.audio_features
            fits = shift <= len(features) // 2
            made.append(replace(sample, audio_features=later(features, shift) if fits else features))
    return made


def _compared(directions: Tensor, rows: Tensor) -> Tensor:
    """(R, A, H) with rows (..., H): the cosines that alignment trains, sharpened."""
    return SHARPNESS * directions @ F.normalize(rows.float(), dim=-1).mT


class JointDecoding(LogitsProcessor):
    """For greedy generation: the language model's log-probabilities, and ``weights`` times what the audio adds.

    Weights are one for each utterance. Where one is 0, the language model's first reading counts alone.

    A state is what the words so far leave, in logarithms: ``said`` (R, A + 1), how likely they are all said after so
    many audio tokens, the last of them in the last one; ``paused`` (R, A + 1), the same with a pause behind.
    """

    def __init__(
        self,
        evidence: Evidence,
        template: PromptTemplate,
        prompt_length: int,
        ends: Sequence[int],
        weights: Sequence[float],
    ):
        device, num_readings = evidence.rows.device, len(evidence.real)
        self._evidence, self._template, self._prompt_length = evidence, template, prompt_length
        self._weights = torch.tensor(weights, device=device).unsqueeze(1)  # (B, 1)
        self._ends = torch.tensor(ends, device=device)
        self._pauses = evidence.log_shares(torch.full((num_readings, 1), evidence.pause, device=device)).squeeze(-1)
        self._last = torch.full((num_readings,), -1, device=device)  # the word said last; none yet
        self._paused = F.pad(self._pauses.cumsum(1), (1, 0))
        self._said = torch.full_like(self._paused, -torch.inf)
        self._begins = self._paused.new_zeros(num_readings)  # of all that the audio may say, what begins so

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """(R, T) ids so far, (R, V) logits -> (R, V) in fp64, the same for all readings of an utterance."""
        reply, ways = input_ids[:, self._prompt_length :], self._evidence.ways
        if reply.shape[1]:
            self._follow(self._words(reply[:, -1:], is_first=reply.shape[1] == 1))
        # fp64: beside what is impossible to hear fp32 would lose the others' differences
        readings = scores.double().log_softmax(-1).unflatten(0, (ways, -1))  # (k, B, V)
        scores = torch.where(self._weights == 0, readings[0], readings.mean(0))
        likeliest, candidates = scores.topk(min(CANDIDATES, scores.shape[-1]))
        words = self._words(candidates, is_first=not reply.shape[1])
        heard = self._heard(candidates.repeat(ways, 1), words.repeat(ways, 1)).unflatten(0, (ways, -1)).mean(0)
        joint = likeliest + self._weights * heard
        return torch.full_like(scores, -torch.inf).scatter(1, candidates, joint).repeat(ways, 1)

    def _heard(self, candidates: Tensor, words: Tensor) -> Tensor:
        """What each candidate (R, C) adds to the log-probability of the words so far; a pause adds nothing."""
        begins = (self._before(words) + self._evidence.log_shares(words)).logsumexp(1)
        ended = torch.logaddexp(self._said[:, -1:], self._paused[:, -1:])
        whole = torch.where(torch.isin(candidates, self._ends), ended, begins).clamp(min=LEAST)
        return torch.where(words == self._evidence.pause, 0.0, whole - self._begins.clamp(min=LEAST).unsqueeze(1))

    def _follow(self, words: Tensor) -> None:
        """The state behind one more word (R, 1)."""
        shares, before = self._evidence.log_shares(words).squeeze(-1), self._before(words).squeeze(-1)
        said = F.pad(_recurrence(before, shares), (1, 0), value=-torch.inf)
        paused = F.pad(_recurrence(said[:, :-1], self._pauses), (1, 0), value=-torch.inf)
        goes_on = words != self._evidence.pause
        self._begins = torch.where(goes_on.squeeze(1), (before + shares).logsumexp(1), self._begins)
        self._said, self._paused = torch.where(goes_on, said, self._said), torch.where(goes_on, paused, self._paused)
        self._last = torch.where(goes_on, words, self._last.unsqueeze(1)).squeeze(1)

    def _before(self, words: Tensor) -> Tensor:
        """(R, C) -> (R, A, C): how likely before each audio token all is said, and the next word may begin in it.

        A word that is said twice has a pause between.
        """
        either = torch.logaddexp(self._said, self._paused)
        again = (words == self._last.unsqueeze(1)).unsqueeze(1)
        return torch.where(again, self._paused[:, :-1, None], either[:, :-1, None])

    def _words(self, tokens: Tensor, is_first: bool) -> Tensor:
        """Ids (rows, C) of a reply as the audio says them: its first word is, there too, inside a sentence."""
        if not is_first:
            return tokens
        return torch.tensor([[self._template.inside_id(token) for token in row] for row in tokens.tolist()]).to(tokens)


def _recurrence(entering: Tensor, shares: Tensor) -> Tensor:
    """x[t] = logaddexp(x[t - 1], entering[t]) + shares[t] along the last dimension, from x[-1] = -inf."""
    upto = shares.cumsum(-1)
    return upto + (entering - (upto - shares)).logcumsumexp(-1)
