"""Everything that a recipe can say: what a paper's table of a training run would state.

Every class is a frozen dataclass; unknown keys and wrong types are refused by `megamm.config.read`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
# More of them is a slip of the finger, whose lists would take hours to make before anything else could go wrong.
Many = Annotated[int, Field(gt=0, le=1 << 20)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# A '/' ends it where samples are named (dataset/key), a '.' where settings are.
DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


@dataclass(frozen=True, config=_STRICT)
class Tokenizer:
    """The vocabulary: one id space for text, control, locations and codes.

    Attributes:
        folder: Where `megamm tokenizer` wrote the tokenizer; read by training, archived in the run.
        adopt: A local Hugging Face folder whose text tokenizer keeps its ids; empty to train sentencepiece pieces.
        text_size: Pieces of a trained text tokenizer, bytes included.
        location_bins: Bins of a coordinate.
        image_codes: Size of the picture code book.
        audio_levels: Levels of the residual sound code.
        audio_codes: Entries a level of the sound code book.
        item_levels: Levels of semantic item ids.
        item_codes: Entries a level of semantic item ids.
        spare: Ids kept free for later.
    """

    folder: str = "data/tokenizer"
    adopt: str = ""
    text_size: Positive = 512
    location_bins: Count = 1000
    image_codes: Count = 0
    audio_levels: Count = 0
    audio_codes: Count = 0
    item_levels: Count = 0
    item_codes: Count = 0
    spare: Count = 0


@dataclass(frozen=True, config=_STRICT)
class Tower:
    """One stock transformers module of the composed model.

    Attributes:
        type: The `model_type` that transformers' Auto classes know, such as `qwen3`.
        pretrained: A local Hugging Face folder to start from; empty for random weights. Its config replaces `config`.
        trainable: False freezes the tower (its projector still trains).
        lr_scale: Factor on the optimizer's learning rate for this tower.
        config: Arguments of the stock config class.
    """

    type: str
    pretrained: str = ""
    trainable: bool = True
    lr_scale: NonNegative = 1.0
    config: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class ImageFeatures:
    """How pictures become the vision tower's input.

    Attributes:
        kind: `naflex` cuts patches at the picture's own aspect ratio; `fixed` resizes to a square (CNN towers).
        patch_size: Side of a patch in pixels (`naflex`).
        max_patches: Bound on patches a picture (`naflex`).
        max_scale: A picture is enlarged at most so much, and then up to whole tokens, so that a small one takes few patches (`naflex`; the
            default is the stock one).
        merge: `merge` x `merge` neighbouring patches become one token.
        size: Side in pixels (`fixed`).
        stride: Pixels a feature-map cell covers a side (`fixed`).
        mean: Subtracted after scaling to [0, 1], a channel each.
        std: Divided by, a channel each.
    """

    kind: Literal["naflex", "fixed"] = "naflex"
    patch_size: Positive = 16
    max_patches: Positive = 256
    max_scale: Annotated[float, Field(gt=0, le=100)] = 100.0
    merge: Positive = 1
    size: Positive = 224
    stride: Positive = 32
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclass(frozen=True, config=_STRICT)
class AudioFeatures:
    """How sounds become the audio tower's input.

    Attributes:
        rate_hz: Sampling rate that sounds are resampled to.
        num_mel: Mel bands.
        hop_length: Samples between frames.
        n_fft: Samples a window.
        min_samples: Shorter sounds are padded with silence.
        normalize: `bands` takes each mel band's mean over the sound away, and with it the colour of a microphone or a room and the loudness
            of a take (changes of gain are then none); `none` leaves them.
        max_seconds: Longer sounds are refused (ledger).
    """

    rate_hz: Positive = 16000
    num_mel: Positive = 128
    hop_length: Positive = 160
    n_fft: Positive = 400
    min_samples: Positive = 8000
    normalize: Literal["none", "bands"] = "none"
    max_seconds: Annotated[float, Field(gt=0)] = 30.0


@dataclass(frozen=True, config=_STRICT)
class Head:
    """A head that answers from the backbone's states in place of tokens: every sample of the recipe is then its own.

    Attributes:
        kind: `linear` (labels of a sample), `detector` (labelled boxes of a picture), `segmenter` (labelled instances, pixel by pixel),
            `ctc` (the characters that a sound says) or `masked` (what was hidden of pictures and sounds, whose answers nobody needs).
        labels: What it can answer, in its fixed order; the characters of `ctc`; none of `masked`. An answer outside sends its sample into
            the ledger.
        states: What it looks at: the `decoder`'s states (of the whole sample, or of its picture or sound), or those of the `vision` tower,
            of the `audio` tower or of both `towers`, before their projectors (`linear` pools each tower's by itself and sets them side by
            side).
        multi_label: A sample may have several labels, or none (`linear`); they stand in label parts of their own, or between commas.
        pool: How states of a sample become one: their `mean`, or the `last` (`linear`).
        hidden_layers: Layers of `hidden_size` between the pooled states and the labels (`linear`).
        hidden_size: Width inside.
        num_layers: Layers that look at the picture (`detector`), 2^n times finer than its cells (`segmenter`).
        queries: What asks for boxes (`detector`): `learned` queries that attend to the picture, or each of its `cells` for the box whose
            middle it is, which learns from fewer pictures.
        num_heads: Attention heads (`detector` with learned queries).
        num_queries: Learned queries, the most boxes of a picture (`detector`; with cells it is as many as there are).
        no_object_weight: Loss weight of a query that is to find nothing (`detector`).
        time_steps: Steps that each state of a sound is spread over (`ctc`): characters and pauses between equal ones need one each.
        mask_share: Share of each picture's cells and each sound's states that is hidden (`masked`).
        mask_span: Side of the blocks of cells, and length of the stretches of states, that are hidden together (`masked`).
        lr_scale: Factor on the optimizer's learning rate.
    """

    kind: Literal["linear", "detector", "segmenter", "ctc", "masked"]
    labels: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    states: Literal["decoder", "vision", "audio", "towers"] = "decoder"
    multi_label: bool = False
    pool: Literal["mean", "last"] = "mean"
    hidden_layers: Annotated[int, Field(ge=0, le=8)] = 0
    hidden_size: Positive = 128
    num_layers: Annotated[int, Field(gt=0, le=24)] = 2
    queries: Literal["learned", "cells"] = "learned"
    num_heads: Positive = 4
    num_queries: Positive = 100
    no_object_weight: Fraction = 0.1
    time_steps: Positive = 4
    mask_share: Annotated[float, Field(gt=0, lt=1)] = 0.6
    mask_span: Positive = 1
    lr_scale: NonNegative = 1.0

    def __post_init__(self) -> None:
        if self.kind == "masked" and self.labels:
            raise ValueError("a masked head fills in what is hidden and has no labels; leave labels out")
        if self.kind == "masked" and self.states == "decoder":
            raise ValueError("a masked head fills in from towers' states; set model.head.states to towers, vision or audio")
        if self.kind != "masked" and not self.labels:
            raise ValueError(f"a {self.kind} head needs labels, what it can answer; set model.head.labels")


@dataclass(frozen=True, config=_STRICT)
class Model:
    """The composed model. A missing vision or audio tower leaves the modality out, a missing head answers in tokens."""

    text: Tower
    vision: Tower | None = None
    audio: Tower | None = None
    image_features: ImageFeatures = ImageFeatures()
    audio_features: AudioFeatures = AudioFeatures()
    projector_lr_scale: NonNegative = 1.0
    head: Head | None = None


@dataclass(frozen=True, config=_STRICT)
class RankBudget:
    """How AdaLoRA takes ranks from layers that do not need them: all have `initial_rank` at first, `adapter.rank` on average at the end.

    Attributes:
        initial_rank: Rank of every layer's change at first.
        warmup_steps: First steps, in which no rank is taken.
        final_steps: Last steps, in which layers keep the ranks that they have come to.
        every: Steps between two times that ranks are shared out.
        sensitivity_decay: What the moving average of an element's sensitivity keeps of itself at a step.
        uncertainty_decay: Likewise, of its changes.
        orthogonality: Weight, in the loss, of how far the factors are from orthogonal.
    """

    initial_rank: Positive = 12
    warmup_steps: Count = 0
    final_steps: Count = 0
    every: Positive = 1
    sensitivity_decay: Annotated[float, Field(gt=0, lt=1)] = 0.85
    uncertainty_decay: Annotated[float, Field(gt=0, lt=1)] = 0.85
    orthogonality: NonNegative = 0.5


@dataclass(frozen=True, config=_STRICT)
class Adapter:
    """Small trainable parts inside the model, whose own weights then stay as they are (`docs/finetuning.md`).

    Attributes:
        method: `lora`, `dora` and `adalora` change linear layers, `prefix` adds keys and values to the decoder's attention, `bottleneck` a
            narrow network behind blocks; `none` trains the model itself.
        targets: `TOWER.PATTERN`, where TOWER is text, vision, audio or projector: linear layers by the last word of their name, such as
            `text.[qv]_proj`; blocks by their number. A prefix is the decoder's alone and takes none.
        rank: Rank of a linear layer's change; of `adalora` the average rank at the end.
        alpha: The change is multiplied by `alpha` over the rank that it is built with.
        dropout: Share of the change's inputs that is dropped in training.
        prefix_tokens: Keys and values of a prefix, a layer and head each.
        bottleneck_size: Width of the network behind a block.
        budget: How `adalora` comes from the rank that it is built with to `rank`.
        train_base: Train the model's own weights as well, as its towers' `trainable` says.
    """

    method: Literal["none", "lora", "dora", "adalora", "prefix", "bottleneck"] = "none"
    targets: Annotated[tuple[Annotated[str, Field(pattern=r"^(text|vision|audio|projector)\..+$")], ...], Field(min_length=1)] = ("text.*",)
    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    prefix_tokens: Positive = 16
    bottleneck_size: Positive = 64
    budget: RankBudget = RankBudget()
    train_base: bool = False

    @property
    def freezes_base(self) -> bool:
        """Whether nothing but the adapter trains."""
        return self.method != "none" and not self.train_base


@dataclass(frozen=True, config=_STRICT)
class Augment:
    """Random changes of training samples, drawn anew for every position; 0 leaves a thing alone.

    Attributes:
        image_crop: Largest share of the area that a random crop takes away; the rest fills the picture's own grid again.
        image_stretch: Largest change of a crop's aspect ratio, as a share.
        image_shift: Largest shift along each side, as a share of it.
        image_zoom: Largest change of scale: sizes are multiplied by 1 - zoom to 1 + zoom.
        image_rotate_degrees: Largest turn to either side.
        image_flip: Mirror half of the pictures left to right.
        image_turns: Turn pictures by none, one, two or three quarters, each as likely; those whose grid of patches is not square by none or
            two. With `image_flip` these are all symmetries of a square, or of a rectangle.
        image_brightness: Largest change of brightness, as a share.
        image_contrast: Largest change of contrast, as a share.
        image_saturation: Largest change of saturation, as a share.
        image_hue: Largest turn of the colour circle, as a share of it.
        audio_gain_db: Largest change of loudness in decibels.
        audio_equalizer_db: Largest gain of a frequency in decibels: a smooth curve, as of other microphones and rooms.
        audio_noise: Largest level of white noise, as a share of the sound's own level.
        audio_speeds: Sounds are played at one of these speeds, pitch included; the planner draws it, because it changes lengths.
        audio_mask_frames: Longest stretch of mel frames that is blanked.
        audio_mask_bands: Widest band of mel bands that is blanked.
        audio_masks: Stretches and bands that are blanked, each.
        item_shuffle: Items that stand side by side, as those of a basket do, stand in another order; for lists whose order says nothing.
    """

    image_crop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    image_stretch: Annotated[float, Field(ge=0, lt=1)] = 0.0
    image_shift: Fraction = 0.0
    image_zoom: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    image_rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 0.0
    image_flip: bool = False
    image_turns: bool = False
    image_brightness: Fraction = 0.0
    image_contrast: Fraction = 0.0
    image_saturation: Fraction = 0.0
    image_hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    audio_gain_db: NonNegative = 0.0
    audio_equalizer_db: NonNegative = 0.0
    audio_noise: NonNegative = 0.0
    audio_speeds: Annotated[tuple[Annotated[float, Field(ge=0.5, le=2)], ...], Field(min_length=1, max_length=16)] = (1.0,)
    audio_mask_frames: Count = 0
    audio_mask_bands: Count = 0
    audio_masks: Positive = 1
    item_shuffle: bool = False


@dataclass(frozen=True, config=_STRICT)
class SampleMapping:
    """What the members of samples mean that are not chats of our own, such as `.jpg` beside `.txt`.

    A text stands in a member (`txt`, `cls`) or in a field of a JSON member (`json:caption`, `json:meta.caption`). A member is named by
    its suffix in small letters; of several with `|` between them (`jpg|png`) the first that a sample has is taken.

    Attributes:
        task: Name of the task; `text` makes the answer a plain document.
        answer: Where the answer, or the document, stands.
        prompt: What the user says after the media, the same for all samples; empty for the task's own instruction.
        question: Where what the user asks of this sample stands; it follows `prompt`.
        image: The picture's member.
        audio: The sound's member.
        classes: Names of classes; an answer is a number into them or one of them. A string names a file with one a line,
            relative to `data.root`.
    """

    task: str
    answer: str
    prompt: str = ""
    question: str = ""
    image: str = ""
    audio: str = ""
    classes: tuple[str, ...] | str = ()


@dataclass(frozen=True, config=_STRICT)
class Dataset:
    """One dataset of the mixture.

    Attributes:
        shards: A path or glob of tar files, relative to `data.root`, or a URL; `{00000..00099}` names a range.
        weight: Share of samples relative to the other datasets; 0 draws none (until `data.schedule` or another weight says so).
        augment: Random changes of its samples in training; held-out data are never changed.
        mapping: What its members mean; absent where samples are `KEY.json` chats.
    """

    shards: str
    weight: NonNegative = 1.0
    augment: Augment = Augment()
    mapping: SampleMapping | None = None


@dataclass(frozen=True, config=_STRICT)
class Limits:
    """What is refused before anything is allocated for it; refused samples are skipped and enter the ledger.

    How long a sound may last is `model.audio_features.max_seconds`.

    Attributes:
        pixels: Pixels of a picture, as its header says (Pillow itself takes no more than this can be set to).
        rate_hz: Sampling rate of a sound.
        sample_bytes: Bytes of a sample in its shard.
        text_bytes: Bytes of a JSON or text member.
        values: Objects and lists of a JSON member.
        members: Files of a sample.
        messages: Messages of a chat.
        parts: Parts of all messages together.
    """

    pixels: Annotated[int, Field(gt=0, le=178_956_970)] = 64_000_000
    rate_hz: Positive = 384_000
    sample_bytes: Positive = 256 << 20
    text_bytes: Positive = 4 << 20
    values: Positive = 100_000
    members: Positive = 1024
    messages: Positive = 4096
    parts: Positive = 16_384


@dataclass(frozen=True, config=_STRICT)
class WeightChange:
    """Other weights of the mixture from a step on.

    Attributes:
        step: The first step that they may reach: they hold from the first position of the next whole window.
        weights: Dataset name -> weight; datasets that are not named keep theirs, 0 draws none.
    """

    step: Positive
    weights: dict[str, NonNegative]


@dataclass(frozen=True, config=_STRICT)
class Reading:
    """How the bytes of shards are read. Nothing here changes what is read.

    Attributes:
        sidecars: Folder for the indexes and lengths of remote shards; empty for `sidecars` under `data.root`.
        max_open_files: Local shards that stay open.
        block_bytes: Remote shards are read, buffered and cached in blocks of this size.
        read_ahead_blocks: Blocks fetched ahead where a remote shard is read in order.
        buffer_bytes: Bound on the remote blocks that a process holds.
        timeout_seconds: Longest wait for a connection, for the next bytes, and for a whole request.
        retries: Further tries of a request that failed in a way that may pass.
        cache_folder: Keep remote blocks in this folder of the node; empty for no cache.
        cache_bytes: Bound on that folder.
    """

    sidecars: str = ""
    max_open_files: Positive = 128
    block_bytes: Annotated[int, Field(ge=4096)] = 1 << 20
    read_ahead_blocks: Count = 4
    buffer_bytes: Positive = 256 << 20
    timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    retries: Count = 5
    cache_folder: str = ""
    cache_bytes: Positive = 64 << 30


@dataclass(frozen=True, config=_STRICT)
class Data:
    """Where samples come from and how they are ordered and packed.

    Attributes:
        root: Folder that shard paths are relative to.
        train: Name -> dataset of the mixture.
        schedule: Changes of the mixture's weights, by ascending step.
        held_out: Name -> dataset that is only evaluated.
        window: Sample positions that are packed together (more fill, more memory).
        shuffle_block: Neighbouring samples that stay together when read (1 shuffles single samples).
        shuffle_window: Blocks that are mixed with each other.
        row_patches: Capacity of a row for vision-tower input, in patches (pictures of `fixed` kind count their tokens).
        row_frames: Capacity of a row for audio-tower input, in mel frames.
        prefetch_steps: Steps decoded ahead.
        prefetch_bytes: Bound on the bytes of decoded batches, the step under way and shared memory of decoder processes included.
        decoders: Where samples are read and decoded: in `threads` of this process, which start at once, or in
            `processes` of their own, which survive a codec that crashes and leave the step the interpreter's lock.
        decode_workers: Threads or processes a rank.
        decode_timeout_seconds: A sample that takes longer to decode is given up (reading has its own limits).
        max_skipped_share: Share of skipped samples that turns into an error.
        max_skipped_in_a_row: Samples of a rank skipped one after the other that turn into an error.
        outline_points: Corners of the outline that stands for an instance of a mask among the tokens, two tokens each.
        limits: What is refused from headers.
        reading: How the bytes of shards are read.
    """

    root: str = "data"
    train: dict[DatasetName, Dataset] = Field(default_factory=dict)
    schedule: tuple[WeightChange, ...] = ()
    held_out: dict[DatasetName, Dataset] = Field(default_factory=dict)
    window: Many = 2048
    shuffle_block: Positive = 1
    shuffle_window: Positive = 64
    row_patches: Positive = 4096
    row_frames: Positive = 12000
    prefetch_steps: Positive = 4
    prefetch_bytes: Positive = 1 << 30
    # Threads start at once, which short runs want; recipes of long ones take processes: 20 to 30 % less processor time a sample, and
    # half of what threads cost a step (benchmarks/decoders).
    decoders: Literal["threads", "processes"] = "threads"
    decode_workers: Positive = 1
    decode_timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    max_skipped_share: Fraction = 0.01
    max_skipped_in_a_row: Positive = 100
    outline_points: Annotated[int, Field(ge=3, le=256)] = 12
    limits: Limits = Limits()
    reading: Reading = Reading()


@dataclass(frozen=True, config=_STRICT)
class Batching:
    """The global batch: `global_rows` rows of `row_tokens` tokens a step, whatever the number of ranks.

    Attributes:
        row_tokens: Capacity of a row in tokens.
        global_rows: Rows a step, over all ranks and micro-steps.
        micro_rows: Rows a rank runs at once.
        accumulation: Micro-steps a step; 0 derives the least that fits, leaving empty rows in slots that are over.
    """

    row_tokens: Annotated[int, Field(gt=0, le=1 << 24)] = 2048
    global_rows: Many = 8
    micro_rows: Many = 1
    accumulation: Annotated[int, Field(ge=0, le=1 << 20)] = 0


@dataclass(frozen=True, config=_STRICT)
class Loss:
    """Chunked linear cross-entropy.

    Attributes:
        chunk_tokens: Tokens whose logits exist at once.
        task_weights: Task name -> weight of its supervised tokens; 1 where not named.
    """

    chunk_tokens: Positive = 1024
    task_weights: dict[str, NonNegative] = Field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class Optimizer:
    """AdamW on fp32 master weights; decay leaves out norms, biases and embeddings of positions (1-d parameters).

    Attributes:
        max_grad_norm: Gradients are clipped to this norm; 0 for never.
        max_unapplied_updates: Updates in a row that may be skipped for gradients that are not finite before the run ends.
    """

    lr: Annotated[float, Field(gt=0)] = 3e-4
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NonNegative = 0.1
    max_grad_norm: NonNegative = 1.0
    max_unapplied_updates: Count = 10


@dataclass(frozen=True, config=_STRICT)
class Spike:
    """When a loss, or a gradient's norm, counts as a spike, and whether the run then goes back and leaves data out.

    Attributes:
        rewind: Go back to the last checkpoint from before a spike, or from before too many updates that were not applied, and
            leave out the data since then; without it a spike is told in the log alone.
        window: Steps whose median and median absolute deviation say what is usual; no step is judged before there are so many.
        factor: Standard deviations above the median that are a spike (one is 1.4826 median absolute deviations).
        patience: Steps above that, one after the other, until the run goes back.
        max_rewinds: How often a run may go back; the next spike ends it.
    """

    rewind: bool = False
    window: Annotated[int, Field(ge=8)] = 128
    factor: Annotated[float, Field(gt=0)] = 6.0
    patience: Positive = 3
    max_rewinds: Count = 3


@dataclass(frozen=True, config=_STRICT)
class Schedule:
    """Learning rate by optimizer step.

    Attributes:
        kind: `cosine`, `wsd` (warm-up, stable, linear decay) or `constant`, each after a linear warm-up.
        warmup_steps: Steps of the warm-up.
        decay_steps: Last steps that decay (`wsd`).
        min_ratio: Learning rate at the end as a share of the peak.
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: Count = 0
    decay_steps: Count = 0
    min_ratio: Fraction = 0.1


@dataclass(frozen=True, config=_STRICT)
class Engine:
    """DeepSpeed and numerics.

    Attributes:
        preset: File of `ds_configs/` without its ending (ZeRO mechanics only).
        precision: `bf16` and `fp16` keep fp32 master weights.
        activation_checkpointing: `none`, `full` (every block recomputed) or `selective` (every second block).
        deterministic: Ask torch for deterministic kernels (bit-exact resume on GPU).
        seed: Seeds weights and everything random outside the data plan.
        overrides: DeepSpeed keys on top of the preset, such as `zero_optimization.stage3_max_live_parameters`.
    """

    preset: str = "zero3"
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    activation_checkpointing: Literal["none", "selective", "full"] = "full"
    deterministic: bool = True
    seed: Count = 0
    overrides: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class Training:
    """How long to train.

    Attributes:
        steps: Optimizer steps of the whole run.
        stop_margin_seconds: Least time that is kept for the last step and its checkpoint before the scheduler ends the job; more where
            steps, evaluations and saves of this run took longer.
    """

    steps: Positive = 1000
    stop_margin_seconds: NonNegative = 120.0


@dataclass(frozen=True, config=_STRICT)
class Checkpointing:
    """When to commit checkpoints and which to keep.

    Attributes:
        every: Steps between commits; 0 commits only at the end and on interruption.
        keep_last: Newest checkpoints that stay.
        keep_every: Steps whose multiples stay for ever; 0 for none.
        asynchronous: Hash and write behind training, which then waits for the copy into host memory only.
        max_failures: Saves that may fail one after the other before the run ends.
        lease_seconds: How long the run's owner may be silent before another job takes the run over, where nothing else tells
            that it is gone.
    """

    every: Count = 500
    keep_last: Positive = 2
    keep_every: Count = 0
    asynchronous: bool = True
    max_failures: Positive = 3
    lease_seconds: Annotated[float, Field(gt=0)] = 60.0


@dataclass(frozen=True, config=_STRICT)
class Evaluation:
    """What is measured on held-out data during training, after the last step as well.

    Attributes:
        every: Steps between two held-out losses; 0 for never.
        rows: Packed rows that a held-out loss is over.
        tasks_every: Steps between two evaluations of tasks, whose answers are judged as by `megamm evaluate`; 0 for never.
        tasks_samples: Samples of each held-out dataset, spread evenly over it and the same every time.
        tasks_batch_size: Samples that a rank answers at once.
        tasks_max_new_tokens: Bound on an answer.
    """

    every: Count = 0
    rows: Positive = 16
    tasks_every: Count = 0
    tasks_samples: Positive = 32
    tasks_batch_size: Positive = 16
    tasks_max_new_tokens: Positive = 128


@dataclass(frozen=True, config=_STRICT)
class Telemetry:
    """What is logged, every how many steps, where to.

    Attributes:
        every: Steps between lines of `metrics.jsonl` and TensorBoard.
        tensorboard: Write event files.
        wandb: Log to Weights & Biases as well (`WANDB_MODE=offline` keeps it local).
        wandb_project: Its project.
        peak_tflops: Peak of one device for MFU; 0 looks the device up and leaves MFU out where it is unknown.
        stall_seconds: A step without progress for so long ends the run, with the stacks of all ranks; 0 takes ten of the longest steps so
            far, and ten minutes at least. The start and saves have six times as long, first steps and evaluations three times.
    """

    every: Positive = 1
    tensorboard: bool = True
    wandb: bool = False
    wandb_project: str = "megamm"
    peak_tflops: NonNegative = 0.0
    stall_seconds: NonNegative = 0.0


@dataclass(frozen=True, config=_STRICT)
class Preflight:
    """What `megamm preflight` wants of nodes. A floor of 0 wants nothing.

    Attributes:
        timeout_seconds: Longest time that a node may take to come, or to show no work.
        min_free_gib: Free space where the run folder and temporary files lie.
        min_write_mib_per_second: Speed of writing and syncing there; nodes that share a disk take turns.
        write_mib: Size of the file that is written for it, as far as a turn suffices.
        min_shared_memory_gib: Free space of /dev/shm.
        min_open_files: Files that a process may open.
        max_clock_skew_seconds: Distance of a node's clock from the first node's: a run's lease goes by clocks.
        min_speed_share: Speed of a matrix product on a rank, as a share of the median rank's.
        link_mib: Size of the tensor that is added up over links.
        min_link_mib_per_second: Bandwidth of an all-reduce on a node, between two, and of all.
        min_link_share: That on a node and between two as a share of the upper quartile.
    """

    timeout_seconds: Annotated[float, Field(ge=1)] = 120.0
    min_free_gib: NonNegative = 1.0
    min_write_mib_per_second: NonNegative = 2.0
    write_mib: Positive = 64
    min_shared_memory_gib: NonNegative = 0.1
    min_open_files: NonNegative = 1024
    max_clock_skew_seconds: NonNegative = 5.0
    min_speed_share: NonNegative = 0.5
    link_mib: Positive = 64
    min_link_mib_per_second: NonNegative = 5.0
    min_link_share: NonNegative = 0.3


@dataclass(frozen=True, config=_STRICT)
class Recipe:
    """One training run, whole."""

    name: str
    model: Model
    seed: Count = 0
    description: str = ""
    adapter: Adapter = Adapter()
    tokenizer: Tokenizer = Tokenizer()
    data: Data = Data()
    batch: Batching = Batching()
    loss: Loss = Loss()
    optim: Optimizer = Optimizer()
    spike: Spike = Spike()
    schedule: Schedule = Schedule()
    engine: Engine = Engine()
    train: Training = Training()
    checkpoint: Checkpointing = Checkpointing()
    evaluation: Evaluation = Evaluation()
    telemetry: Telemetry = Telemetry()
    preflight: Preflight = Preflight()
