"""An experiment's settings: one typed tree, defaults here and nowhere else.

Three layers, later ones win: the defaults below, a YAML recipe that holds only what differs, and ``section.key=value``
words of the command line. All problems are reported at once, each with file, line, key and the nearest valid key.

What a recipe *reads* (bases, manifests, the DeepSpeed JSON) stands relative to the recipe file; what commands *write*
(``run.dir``, ``data.shards``) stands relative to the folder the command runs in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Passes = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Precision = Literal["bf16", "fp32"]


def _as_mixture(value: Any) -> Any:
    """One split is a mixture of it alone; the order in which splits are written changes nothing."""
    if isinstance(value, dict) and all(isinstance(split, str) for split in value):
        return dict(sorted(value.items()))
    return {value: 1.0} if isinstance(value, str) else value


def _as_written(mixture: dict[str, float]) -> str | dict[str, float]:
    return next(iter(mixture)) if list(mixture.values()) == [1.0] else mixture


Mixture = Annotated[
    dict[str, Passes], Field(min_length=1), BeforeValidator(_as_mixture), PlainSerializer(_as_written)
]  # split -> passes over it in an epoch


class Settings(BaseModel):
    """A section: unknown keys are errors, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Preparation(Settings):
    """A command that makes something the recipe needs; run by the quickstart when ``makes`` does not exist."""

    makes: str
    run: list[str]


class Bases(Settings):
    """The two pretrained models, each a folder in stock Hugging Face format or a name on the hub."""

    whisper: str
    qwen2_vl: str


class Audio(Settings):
    """What happens between the sound file and the encoder's features."""

    long_audio: Literal["reject", "join", "truncate"] = "reject"  # audio beyond the encoder's window
    # full: the encoder always runs over its whole window, as Whisper was trained, and its frames are exact. trimmed:
    # over the half seconds that hold the utterance, with less work (a third at 10 s of 30) and somewhat other frames.
    window: Literal["full", "trimmed"] = "full"
    feature_dtype: Literal["bfloat16", "int8"] = "bfloat16"  # int8 halves the shards and is lossy
    max_rejects: Share = 0.1  # more rejected utterances than this share stop the precomputation
    encode_batch_size: Positive = 16  # windows per forward of the encoder


class Projector(Settings):
    """The trained bridge from encoder frames to the language model's embeddings."""

    kind: Literal["linear", "mlp", "swiglu", "conv"] = "mlp"  # graft/model/projector.py; conv hears a second of frames
    stack_factor: Positive = 4  # frames per audio token: 50 / 4 = 12.5 tokens a second, as NeMo's SALM
    hidden_size: Positive | None = None  # None: the language model's hidden size


class Prompt(Settings):
    """The words around the audio. An utterance's own ``instruction`` in the manifest comes before this one."""

    system: str = "You are a helpful assistant."
    instruction: str = "Transcribe the speech."


class View(Settings):
    """One more way to hear every utterance of a split; made from the sound file, before the encoder."""

    speed: Annotated[float, Field(ge=0.5, le=2)] = 1.0  # pitch moves with it: nearly another voice
    snr_db: Annotated[float, Field(ge=-20, le=60)] | None = None  # noise so far below the speech, of its spectrum
    gain_db: Annotated[float, Field(ge=-60, le=20)] = 0.0  # softer or louder, the noise too

    @model_validator(mode="after")
    def _check_differs(self) -> View:
        if not self.model_dump(exclude_defaults=True):
            raise ValueError("a view changes something: give it a speed, an snr_db or a gain_db")
        return self

    @property
    def name(self) -> str:
        """What tells its utterances from the plain ones: ``speed=0.9,snr_db=10``."""
        return ",".join(f"{key}={value:g}" for key, value in self.model_dump(exclude_defaults=True).items())


class Data(Settings):
    """Where utterances and features are, and how steps are made of them."""

    manifests: dict[str, str] = {}  # split -> manifest
    # Split -> how else its utterances are heard, besides as they are: {train: [{speed: 0.9}, {speed: 1.1, snr_db: 15}]}
    # makes three of each. Speeds 0.9 and 1.1 are what speech recognisers are usually trained with (Ko et al., 2015).
    views: dict[str, list[View]] = {}
    # The set of a split is the folder <shards>/<split>. Training and scoring also read from http(s)://... and from
    # pipe:COMMAND, a command that writes {file} to its output: pipe:aws s3 cp s3://bucket/sets/tiny/{file} -
    shards: str = "shards/sets/default"
    cache_dir: str = "shards/cache"  # of what comes from elsewhere; the ranks and runs of a machine share it
    cache_gb: Rate = 200.0  # least recently used shards go first; training needs the whole set in random order
    # What is trained on: one split, or {split: weight} of several. A weight is the number of passes over that split in
    # an epoch: 1 every utterance once, 2 twice, 0.5 half of them and the other half in the next epoch.
    train_split: Mixture = {"train": 1.0}
    features: Literal["shards", "online"] = "shards"
    samples_per_shard: Positive = 512
    shuffle_pool: Positive = 64  # steps whose utterances are sorted by length together; more: less padding, less chance
    prefetch: Positive = 4  # steps read ahead: all micro-batches of a rank


class Stage(Settings):
    """One training stage."""

    max_steps: Positive = 1000
    # So many of stage 1's steps come first and run without the language model, at a fraction of the cost: the projector
    # learns to give, for what is said, the language model's own embeddings of those words (graft/model/alignment.py).
    alignment_steps: NotNegative = 0
    learning_rate: Rate = 1e-3  # of the projector
    lora_learning_rate: Rate = 2e-4  # of the adapters; stage 2 only
    warmup_steps: NotNegative = 50
    min_lr_ratio: Share = 0.1  # the cosine ends at this share of the peak
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: Rate = 1e-8
    max_grad_norm: Rate = 1.0
    global_batch_size: Positive = 64  # utterances per step over all ranks
    micro_batches: Positive = 8  # of a step, whatever the number of ranks: they share them, so take a multiple of it
    micro_batch_tokens: Positive = 8192  # padded positions per forward on one rank: this bounds the memory
    time_masks: NotNegative = 0  # spans of encoder frames set to zero in each utterance, against overfitting
    time_mask_frames: Positive = 10  # longest span; a frame is 20 ms
    # Each pass over an utterance begins 0 to so many frames later, so that words fall into other audio tokens:
    # projector.stack_factor - 1 shows every way there is.
    time_shift_frames: NotNegative = 0
    # Each pass over an utterance has the mean and spread of its frames moved towards those of another of the step, by
    # up to this share of the way (MixStyle): the projector hears more voices than there are. 1 is a good value. The
    # other has to be read, and online to be encoded, too.
    voice_mixing: Share = 0.0


class Lora(Settings):
    """Adapters on the language model; ``target_modules`` is one regular expression that must match in full."""

    r: Positive = 64
    alpha: Positive = 128
    dropout: Share = 0.0  # 0 also spares a copy of each adapter's input
    target_modules: str = r"model\.(language_model\.)?layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"


class Evaluation(Settings):
    """Generated transcripts and their word error rate."""

    split: str = "valid"  # scored during training
    test_split: str = "test"  # scored at the end
    every: Positive = 500  # steps
    max_utterances: Positive | None = None  # of the split, during training; None: all
    batch_size: Positive = 16
    max_new_tokens: Positive = 256
    # Where stage 1 aligned the projector: weight of what its embeddings say by themselves, beside the language model's
    # word for it (graft/evaluation/joint.py); a batch has stack_factor rows of each utterance then. 0: the language
    # model alone.
    alignment_weight: Annotated[float, Field(ge=0, le=10)] = 0.0
    normalizer: Literal["none", "basic", "english"] = "basic"
    listening_gap: Share = 0.05  # WER that swapped audio must add, or the model is told to be deaf


class Run(Settings):
    """One training: where it writes, how often, on what."""

    dir: str = "runs/default"
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] = 1
    precision: Precision = "bf16"  # of frozen weights and of the forward pass; trained weights are fp32
    ds_config: str | None = None  # None: ds_configs/zero2.json
    ranks: Positive | None = None  # refuse to start on any other number; None: any
    log_every: Positive = 10  # steps
    log_utterances: bool = False  # the ids of every step, in utterances.jsonl
    stop_after: Positive | None = None  # save and stop, to be continued, after this many steps of this start
    checkpoint_every: Positive = 500
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2  # besides the best of each stage and its last
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of each decoder layer
    start_timeout_s: Rate = 300  # for all ranks to come
    patience_s: Rate = 60  # a rank that keeps the others waiting longer than this is named
    timeout_s: Rate = 600  # a collective that waits longer than this ends the run


class Recipe(Settings):
    """The whole experiment."""

    name: str = "default"
    prepare: list[Preparation] = []
    bases: Bases
    audio: Audio = Audio()
    projector: Projector = Projector()
    prompt: Prompt = Prompt()
    data: Data = Data()
    stage1: Stage = Stage()
    stage2: Stage = Stage()
    lora: Lora = Lora()
    evaluation: Evaluation = Evaluation()
    run: Run = Run()

    @model_validator(mode="after")
    def _check_between_sections(self) -> Recipe:
        for name, stage in (("stage1", self.stage1), ("stage2", self.stage2)):
            if stage.warmup_steps >= stage.max_steps:
                raise ValueError(
                    f"{name}.warmup_steps ({stage.warmup_steps}) leaves nothing of {name}.max_steps "
                    f"({stage.max_steps}): lower the first or raise the second"
                )
        if self.stage2.alignment_steps:
            raise ValueError("stage2.alignment_steps must stay 0: they are the first steps of stage 1")
        if self.evaluation.alignment_weight and not self.stage1.alignment_steps:
            raise ValueError(
                f"evaluation.alignment_weight is {self.evaluation.alignment_weight:g}, but stage1.alignment_steps is "
                "0: without them audio embeddings say nothing by themselves"
            )
        for split, views in self.data.views.items():
            if split not in self.data.manifests:
                known = ", ".join(self.data.manifests) or "none"
                raise ValueError(f"data.views names split '{split}', data.manifests has: {known}")
            names = [view.name for view in views]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice:
                raise ValueError(f"data.views.{split} holds {twice} twice: one of them is enough")
        return self

    def stage(self, number: int) -> Stage:
        """The settings of stage 1 or 2."""
        return {1: self.stage1, 2: self.stage2}[number]

    def set_folder(self, split: str) -> Path:
        """Folder of the feature set of ``split``."""
        return Path(self.data.shards) / split

    def manifest(self, split: str) -> Path:
        """Path of the manifest of ``split``.

        Raises:
            ValueError: if the recipe names none.
        """
        if split not in self.data.manifests:
            known = ", ".join(self.data.manifests) or "none"
            raise ValueError(f"no manifest for split '{split}'; data.manifests has: {known}")
        return Path(self.data.manifests[split])

    def as_yaml(self) -> str:
        """The resolved settings, every default written out; :func:`load_recipe` reads them back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply ``section.key=value`` words over it.

    Raises:
        ValueError: one line per problem: place, key, what is wrong, nearest valid key.
    """
    path = Path(path)
    tree, places = _read(path)
    problems = _apply(overrides, tree, places)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems += [_sentence(problem, places, path) for problem in error.errors()]
    if problems:
        raise ValueError(f"{path} cannot be used:\n" + "\n".join(f"  {problem}" for problem in problems))
    return recipe


Key = tuple[str | int, ...]  # where in the tree; ``places`` maps it to a line of the file or a word of the command line


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes ``1e-4`` for a string; here it is the number that everyone means."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, str]]:
    if not path.is_file():
        raise ValueError(f"recipe {path} does not exist{_nearest_recipe(path)}")
    text = path.read_text(encoding="utf-8")
    try:
        tree, node = yaml.load(text, _Loader), yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {type(tree).__name__}, expected sections such as 'bases:' and 'run:'")
    places: dict[Key, str] = {}
    for key, line in _lines(node):
        if key in places:  # YAML would take the last one, and what the first one held would be gone
            raise ValueError(f"{path}:{line}: {'.'.join(map(str, key))} is there already, at {places[key]}")
        places[key] = f"{path}:{line}"
    return _anchored(tree, path.resolve().parent), places


def _lines(node: yaml.Node, key: Key = ()) -> Iterator[tuple[Key, int]]:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield (*key, name.value), name.start_mark.line + 1
            yield from _lines(value, (*key, name.value))
    elif isinstance(node, yaml.SequenceNode):
        for position, value in enumerate(node.value):
            yield (*key, position), value.start_mark.line + 1
            yield from _lines(value, (*key, position))


def _apply(overrides: Sequence[str], tree: dict[str, Any], places: dict[Key, str]) -> list[str]:
    problems = []
    for word in overrides:
        dotted, equals, text = word.partition("=")
        if not equals:
            problems.append(f"'{word}': expected section.key=value")
            continue
        key = tuple(dotted.split("."))
        _merge(tree, _anchored(_nested(key, _value(text)), Path.cwd()))
        places[key] = f"'{word}'"
    return problems


def _value(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _nested(key: Sequence[str], value: Any) -> dict[str, Any]:
    return {key[0]: _nested(key[1:], value) if len(key) > 1 else value}


def _merge(tree: dict[str, Any], over: dict[str, Any]) -> None:
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], value)
        else:
            tree[name] = value


def _sentence(problem: Any, places: dict[Key, str], path: Path) -> str:
    key: Key = problem["loc"]
    dotted = ".".join(str(part) for part in key) or "recipe"
    place = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), str(path))
    if problem["type"] == "extra_forbidden":
        return f"{place}: {dotted}: unknown key{_nearest_key(key)}"
    if problem["type"] == "missing":
        return f"{place}: {dotted}: missing; it has no default"
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
    return f"{place}: {dotted}: {message}{given}"


def _nearest_key(key: Key) -> str:
    valid = _valid_names(key[:-1])
    near = difflib.get_close_matches(str(key[-1]), valid, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{near[0]}'?"
    elsewhere = [f"{name}.{key[-1]}" for name in Recipe.model_fields if str(key[-1]) in _valid_names((name,))]
    return f"; did you mean '{elsewhere[0]}'?" if elsewhere else f"; valid keys: {', '.join(valid)}"


def _valid_names(section: Key) -> list[str]:
    """Keys of a section; a list's number or a dictionary's own key leads into what it holds."""
    kind: Any = Recipe
    for name in section:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            field = kind.model_fields.get(str(name))
            kind = field.annotation if field else None
        else:
            kind = next(reversed(get_args(kind)), None)
    return list(kind.model_fields) if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _nearest_recipe(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    near = difflib.get_close_matches(path.name, [file.name for file in folder.glob("*.yaml")], n=1, cutoff=0.4)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _anchored(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """``tree`` with what the recipe reads made independent of the current folder; hub names stay as they are."""

    def anchor(value: Any, key: Key) -> Any:
        if isinstance(value, dict):
            return {name: anchor(inner, (*key, name)) for name, inner in value.items()}
        is_base = key[:1] == ("bases",)
        is_file = key[:2] == ("data", "manifests") or key == ("run", "ds_config")
        is_folder = is_base and isinstance(value, str) and (value.startswith((".", "/")) or (folder / value).is_dir())
        return str((folder / value).resolve()) if isinstance(value, str) and (is_file or is_folder) else value

    return anchor(tree, ())
