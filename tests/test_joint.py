"""Joint decoding: prefix scores against every path by hand, and replies that say what the audio does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_bases as tiny
import torch

from graft.data.collate import collate_generation
from graft.data.loader import FeatureSample
from graft.data.prompt import PromptTemplate
from graft.evaluation import joint
from graft.evaluation.evaluate import evaluate
from graft.evaluation.joint import LEAST, Evidence, JointDecoding, all_ways
from graft.evaluation.transcribe import generate, inferring
from graft.model.alignment import SHARPNESS, directions
from graft.model.assemble import Assembled, assemble
from graft.ranks import Ranks
from graft.recipe import Evaluation as Settings
from graft.recipe import load_recipe
from tests.test_transcribe import Source

PAUSE, END, PROMPT = 0, 4, [[9, 9], [9, 9]]
ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))  # pause, three words, the end
AS_IT_IS = SimpleNamespace(inside_id=lambda token: token)


def collapsed(path: Sequence[int]) -> list[int]:
    """What a path says: equal neighbours are one, pauses are nothing."""
    return [word for word, before in zip(path, [PAUSE, *path], strict=False) if word != PAUSE and word != before]


def log(probability: float) -> float:
    return math.log(probability) if probability else LEAST


class ByHand:
    """All paths of an utterance (A, H), with their probabilities."""

    def __init__(self, embeds: torch.Tensor) -> None:
        unit = torch.stack([row / row.norm() for row in ROWS])
        shares = [(SHARPNESS * unit @ (embed / embed.norm())).softmax(0) for embed in embeds]
        self.said = [
            (collapsed(path), math.prod(float(share[row]) for share, row in zip(shares, path, strict=True)))
            for path in itertools.product(range(len(ROWS)), repeat=len(embeds))
        ]

    def begins(self, words: list[int]) -> float:
        """Log-probability that what is said begins with ``words``."""
        return log(sum(p for said, p in self.said if said[: len(words)] == words))

    def is_all(self, words: list[int]) -> float:
        """Log-probability that nothing else is said."""
        return log(sum(p for said, p in self.said if said == words))


def evidence(embeds: torch.Tensor, num_tokens: Sequence[int]) -> Evidence:
    where = directions(embeds, ROWS)
    whole = (SHARPNESS * where @ torch.nn.functional.normalize(ROWS, dim=-1).T).logsumexp(-1)
    real = torch.arange(embeds.shape[1]) < torch.tensor(num_tokens).unsqueeze(1)
    return Evidence(where, whole, ROWS, real, PAUSE)


@pytest.mark.parametrize("said", [[], [1], [2, 3], [2, 2], [3, 3, 3], [1, 2, 1]])
def test_prefix_scores_are_the_sum_over_all_paths(said: list[int]) -> None:
    """Two utterances, one shorter: at each word, what every candidate adds to the language model's log-probability."""
    embeds = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
    by_hand = [ByHand(embeds[0, :4]), ByHand(embeds[1])]
    decoding = JointDecoding(evidence(embeds, [4, 5]), AS_IT_IS, len(PROMPT[0]), [END], [1.0, 1.0])
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(3))
    for count in range(len(said) + 1):  # as generation asks, word by word
        words = said[:count]
        scores = decoding(torch.tensor([row + words for row in PROMPT]), logits) - logits.log_softmax(-1)
    for row, paths in zip(scores, by_hand, strict=True):
        before = paths.begins(said)
        expected = [0.0, *(paths.begins([*said, word]) - before for word in (1, 2, 3)), paths.is_all(said) - before]
        assert row.tolist() == pytest.approx(expected, abs=1e-3, rel=1e-6)


def test_a_reply_of_thousands_of_words_is_still_heard() -> None:
    """An hour of audio that is nobody's words, and a reply as long: the audio still tells likely words from others."""
    embeds = torch.randn(1, 4_000, 6, generator=torch.Generator().manual_seed(8))
    said = torch.randint(1, 4, (1, 2_000), generator=torch.Generator().manual_seed(9))
    heard = evidence(embeds, [4_000])
    heard = replace(heard, whole=heard.whole + 10)  # all is 10 nats less likely
    decoding = JointDecoding(heard, AS_IT_IS, 0, [END], [1.0])
    for count in range(said.shape[1] + 1):
        scores = decoding(said[:, :count], torch.zeros(1, 5))
    assert decoding._begins.item() < -30_000 and scores[0, 1:4].unique().numel() == 3
    assert scores[0, END] < scores[0, 1:4].max(), "a thousand audio tokens would be left"


def test_what_the_audio_cannot_hold_is_hardly_ever_said() -> None:
    """Three times the same word needs pauses between: five audio tokens. What follows still has finite scores."""
    embeds = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(2))
    decoding = JointDecoding(evidence(embeds, [4]), AS_IT_IS, 2, [END], [1.0])
    for words in ([], [2], [2, 2]):
        scores = decoding(torch.tensor([PROMPT[0] + words]), torch.zeros(1, 5))
    assert scores[0, 2] < -1000 < scores[0, [1, 3, 4]].min()
    assert torch.isfinite(decoding(torch.tensor([[*PROMPT[0], 2, 2, 2]]), torch.zeros(1, 5))).all()


def test_where_the_audio_can_hold_nothing_the_language_model_decides() -> None:
    """Two audio tokens, two words said, and the end is not among the candidates: all of them are impossible to hear."""
    embeds = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(2))
    decoding = JointDecoding(evidence(embeds, [2]), AS_IT_IS, 2, [7], [1.0])
    logits = torch.tensor([[-90.0, 0.1, 0.3, 0.2, 0.0]])
    for words in ([], [1], [1, 3]):
        scores = decoding(torch.tensor([PROMPT[0] + words]), logits)
    assert scores[0, 1:].argsort(descending=True).tolist() == [1, 2, 0, 3]


def test_several_readings_are_averaged() -> None:
    """Two utterances in two ways, which come as four: by the language model, and by the audio, where it has a say."""
    embeds, lengths = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(6)), [4, 5, 4, 5]
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(7))
    reply = torch.tensor([[*PROMPT[0], 2, 1]] * 4)

    def heard(found: Evidence, logits: torch.Tensor, *weights: float) -> torch.Tensor:
        decoding = JointDecoding(found, AS_IT_IS, 2, [END], weights)
        return [decoding(reply[: len(logits), :length], logits) for length in (2, 3, 4)][-1]

    parts = [slice(0, 2), slice(2, 4)]
    first, second = (heard(evidence(embeds[rows], lengths[rows]), logits[rows], 1.0, 1.0) for rows in parts)
    together = replace(evidence(embeds, lengths), ways=2)
    both = heard(together, logits, 1.0, 1.0)
    torch.testing.assert_close(both, ((first + second) / 2).repeat(2, 1))
    assert (first - second).abs().max() > 1
    silent = heard(together, logits, 0.0, 1.0)
    torch.testing.assert_close(silent[1::2], both[1::2])
    torch.testing.assert_close(silent[::2], logits[[0, 0]].double().log_softmax(-1))


def test_audio_is_read_from_every_frame_of_a_token(tmp_path: Path) -> None:
    folders = tiny.whisper_folder(tmp_path / "w"), tiny.qwen2_vl_folder(tmp_path / "q")
    graft = assemble(tiny.recipe(*folders, projector={"stack_factor": 3}))
    template = PromptTemplate.from_processor(graft.processor, "Be brief.", "Transcribe the speech.")
    frames = torch.randn(12, tiny.WHISPER["d_model"], generator=torch.Generator().manual_seed(5)).bfloat16()
    samples = [FeatureSample("long", "", frames), FeatureSample("short", "", frames[:3])]
    batch = collate_generation(all_ways(samples, 3), template)
    with torch.no_grad():
        found = Evidence.of(graft.model, batch, template.pause_id, 3)
        later = torch.cat([frames[2:], torch.zeros_like(frames[:2])])
        embeds = graft.model.model.project(later[None], torch.tensor([12]))
        expected = directions(embeds.float(), graft.model.get_input_embeddings().weight)
    assert found.ways == 3 and found.directions.shape[:2] == (6, 4)
    torch.testing.assert_close(found.directions[4], expected[0])  # the long one's third way
    torch.testing.assert_close(found.directions[5], found.directions[1])  # of the short one too little would be left
    assert found.real.sum(1).tolist() == [4, 1] * 3


def test_a_pause_in_a_reply_changes_nothing() -> None:
    embeds = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(2))
    scores = []
    for reply in ([1, 2], [1, PAUSE, 2]):
        decoding = JointDecoding(evidence(embeds, [4]), AS_IT_IS, 2, [END], [0.7])
        for count in range(len(reply) + 1):
            last = decoding(torch.tensor([PROMPT[0] + reply[:count]]), torch.zeros(1, 5))
        scores.append(last)
    assert torch.equal(*scores)


@pytest.fixture(scope="module")
def graft(tmp_path_factory: pytest.TempPathFactory) -> Assembled:
    """A random language model, and a linear projector."""
    folder = tmp_path_factory.mktemp("bases")
    bases = tiny.whisper_folder(folder / "w"), tiny.qwen2_vl_folder(folder / "q")
    return assemble(tiny.recipe(*bases, projector={"kind": "linear", "stack_factor": 1}))


@pytest.fixture(scope="module")
def template(graft: Assembled) -> PromptTemplate:
    return PromptTemplate.from_processor(graft.processor, "Be brief.", "Transcribe the speech.")


@pytest.fixture(scope="module")
def samples(graft: Assembled, template: PromptTemplate) -> list[FeatureSample]:
    """An utterance that the projector, made for it, turns into the letters of abbacc with pauses between; the begin of
    it; and the same with an instruction of its own.
    """
    slots = [template.pause_id, *(i for letter in template.spoken_ids("abbacc") for i in (letter, template.pause_id))]
    chance = torch.Generator().manual_seed(5)
    stack = template.stack_factor
    features = torch.randn(stack * len(slots), tiny.WHISPER["d_model"], generator=chance).bfloat16()
    rows = graft.model.get_input_embeddings().weight[slots].float()
    linear = graft.model.model.multi_modal_projector.linear
    with torch.no_grad():
        linear.bias.zero_()
        joined = features.float().reshape(len(slots), -1)
        linear.weight.copy_((torch.linalg.pinv(joined) @ rows).T)
    other = FeatureSample("other", "", features, "Say anything.")
    return [FeatureSample("said", "", features), FeatureSample("short", "", features[: 3 * stack]), other]


@pytest.fixture
def all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest of a language model that knows nothing are of no use."""
    monkeypatch.setattr(joint, "CANDIDATES", tiny.VOCAB_ROWS)


def replies(graft: Assembled, template: PromptTemplate, samples: Sequence[FeatureSample], weight: float) -> list[str]:
    with inferring(graft.model, "cpu", "fp32"):
        return generate(graft.model, samples, template, 12, "cpu", weight)[0]


def test_a_reply_says_what_the_audio_does(
    graft: Assembled, template: PromptTemplate, samples: list[FeatureSample], all_candidates: None
) -> None:
    """Beside a language model that knows nothing; where an instruction asks for something else it is left alone."""
    said, short, other = replies(graft, template, samples, 10.0)
    assert (said, short) == ("abbacc", "a")
    untouched = replies(graft, template, samples, 0.0)
    assert untouched[0] != said != other == untouched[2]


def test_a_joint_reply_is_the_same_alone_and_in_a_batch(
    graft: Assembled, template: PromptTemplate, samples: list[FeatureSample], all_candidates: None
) -> None:
    together = replies(graft, template, samples, 1.0)
    assert together == [replies(graft, template, [sample], 1.0)[0] for sample in samples]
    assert together[0] != replies(graft, template, samples, 0.0)[0], "the audio adds nothing, so this proves nothing"


def test_an_evaluation_decodes_as_its_settings_say(
    graft: Assembled, template: PromptTemplate, samples: list[FeatureSample], all_candidates: None
) -> None:
    source = Source([len(samples[0].audio_features)])
    source.entries, source.features = [replace(source.entries[0], text="abbacc")], [samples[0].audio_features]
    told = {"device": "cpu", "precision": "fp32", "swapped": False}
    for weight, is_right in ((10.0, True), (0.0, False)):
        settings = Settings(alignment_weight=weight, max_new_tokens=12)
        summary = evaluate(graft.model, source, template, Ranks(), settings=settings, **told).summary
        assert (summary["wer"] == 0) == is_right and summary["alignment_weight"] == weight


def test_the_first_word_is_heard_inside_a_sentence() -> None:
    root = Path(__file__).resolve().parents[1]
    recipe = load_recipe(root / "recipes" / "tiny.yaml")
    processor = assemble(recipe, meta=True).processor
    template = PromptTemplate.from_processor(processor, recipe.prompt.system, recipe.prompt.instruction)
    (first, *_), (inside, *_) = (template.text_ids(text) for text in ("seven eight", " seven eight"))
    assert first != inside == template.inside_id(first) == template.inside_id(inside)
    assert processor.tokenizer.decode([inside]) == " seven"
    assert all(template.inside_id(end) == end for end in template.end_ids)


def test_a_part_of_a_character_is_no_word() -> None:
    """Its bytes decode to the sign for what is no character, and of that a vocabulary may well have a token."""

    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return {7: "\ufffd", 8: "one"}[ids[0]]

        def __call__(self, texts: list[str], **_: bool) -> dict[str, list[list[int]]]:
            return {"input_ids": [[{" ": 1, " one": 3, " \ufffd": 5}[text]] for text in texts]}

    template = PromptTemplate(SimpleNamespace(tokenizer=Tokenizer()), "", "", 4, audio_token_id=0, pad_token_id=0)
    assert (template.inside_id(7), template.inside_id(8)) == (7, 3)


def test_without_alignment_there_is_no_evidence() -> None:
    tiny_recipe = Path(__file__).resolve().parents[1] / "recipes" / "tiny.yaml"
    with pytest.raises(ValueError, match=r"alignment_weight is 0\.5, but stage1\.alignment_steps is 0"):
        load_recipe(tiny_recipe, ["evaluation.alignment_weight=0.5", "stage1.alignment_steps=0"])
