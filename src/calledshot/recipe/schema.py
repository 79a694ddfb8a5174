"""The recipe: everything that decides a run, as frozen dataclasses.

A docstring under a field is that field's documentation: `shot recipe keys` and the errors read it from here.
Field types are limited to bool, int, float, str, tuples of those, `dict[str, float]`, and tuples of dataclasses.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Source:
    """One corpus of the mixture."""

    path: str = "python"
    """`python` (the interpreter's standard library), a file, a folder, a glob, or `hf:OWNER/NAME[/GLOB]`."""
    name: str = ""
    """How tables call it; empty takes it from the path."""
    format: str = "auto"
    """`auto` (by suffix), `text` (one document a file), `jsonl` or `parquet`."""
    weight: float = 1.0
    """Share of the sequences drawn from this source, relative to the others."""
    max_epochs: float = 0.0
    """Passes after which the source is used up and the others take its share; 0 sets no bound."""
    text_field: str = "text"
    """Field that holds the text, in JSONL and Parquet."""
    id_field: str = "id"
    """Field that names the document; where it is absent, the file and the place in it do."""
    language_field: str = ""
    """Field that holds the document's language; empty takes `language` for all."""
    language: str = "und"
    """Language of documents that do not say (BCP 47, or a programming language's name)."""
    modality: str = "text"
    """`text`; images come later under the same field."""
    exclude: tuple[str, ...] = ()
    """Globs, matched against the path inside the source, of files to leave out."""


@dataclass(frozen=True)
class Phase:
    """Weights that hold from a point of the run on."""

    start: float = 0.0
    """Share of the run's sequences after which this phase begins, in [0, 1)."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weight by source name; a source that is not named keeps its own."""


@dataclass(frozen=True)
class Data:
    """What is read, how it is cut into tokens, and what is held out."""

    sources: tuple[Source, ...] = (Source(),)
    """The mixture."""
    phases: tuple[Phase, ...] = ()
    """Changes of the mixture's weights during the run."""
    tokenizer: str = "bpe"
    """`bpe` trains a byte-level BPE of `model.vocabulary` entries on the sources; else a `tokenizer.json`, a folder
    that holds one, or `hf:OWNER/NAME`."""
    held_out: float = 0.05
    """Share of whole documents held out of training, chosen by a hash of their ids."""
    skip: tuple[int, ...] = ()
    """Batches, counted from 0, that are left out (the following ones move up); `shot data show` says a step's."""


@dataclass(frozen=True)
class Model:
    """The trunk's shape."""

    layers: int = 6
    """Blocks."""
    width: int = 384
    """Width of the residual stream, D."""
    heads: int = 6
    """Query heads, H."""
    kv_heads: int = 2
    """Key and value heads, K: `heads` is MHA, 1 is MQA, between is GQA."""
    head_width: int = 0
    """Width of a head, C; 0 takes width / heads."""
    hidden: int = 0
    """Width inside the feed-forward, F; 0 takes 8/3 of the width, rounded up to a multiple of 64."""
    vocabulary: int = 8192
    """Rows of the embedding, special tokens included; 0 takes the tokenizer's size, rounded up to a multiple of 64."""
    context: int = 512
    """Longest sequence in tokens, T."""
    tied_embeddings: bool = False
    """The head shares the embedding's matrix."""
    qk_norm: bool = True
    """RMSNorm on each query and key head before RoPE."""
    rope_base: float = 10_000.0
    """Base of RoPE's wavelengths."""
    softcap: float = 0.0
    """Logits become softcap * tanh(logits / softcap); 0 leaves them alone."""
    norm_epsilon: float = 1e-6
    """Epsilon of every norm."""
    topology: str = "decoder"
    """`decoder` (causal), `prefix` (the same stack, prefixes seen both ways) or `encoder-decoder`."""
    encoder_layers: int = 0
    """Blocks of the encoder; 0 takes `layers`."""
    encoder_width: int = 0
    """Width of the encoder, a multiple of the head's width where it is another than `width`; 0 takes `width`."""
    encoder_hidden: int = 0
    """Width inside the encoder's feed-forward; 0 takes `hidden` scaled with the width."""
    encoder_context: int = 0
    """Longest input of the encoder in tokens, S; 0 takes `context`, which is then the decoder's alone."""
    encoder_pooling: int = 1
    """1, 2, 4 or 8: the encoder averages its tokens in pairs so often, between its layers, that so many become one."""
    positions: str = "rope"
    """`rope`, `t5` (relative bias, one table a stack) or `none`."""
    rope_scaling: str = "none"
    """How RoPE reaches past the length it was trained at: `none`, `ntk`, `dynamic`, `yarn` or `llama3`."""
    rope_factor: float = 1.0
    """Times that `context` is longer than `rope_original_context`, for `rope_scaling`."""
    rope_original_context: int = 0
    """Length that RoPE was trained at, for `rope_scaling`."""
    norm: str = "rmsnorm"
    """`rmsnorm` or `layernorm` (with gain, without bias)."""
    norm_placement: str = "pre"
    """`pre`, `post` (after the sum, as in the first Transformer) or `sandwich` (before and after each branch)."""
    feed_forward: str = "swiglu"
    """`swiglu`, `geglu`, `gelu` or `relu2` (squared ReLU)."""
    experts: int = 0
    """Experts in each feed-forward, E; 0 is dense."""
    top_k: int = 2
    """Experts that a token goes to."""
    expert_hidden: int = 0
    """Width inside one expert; 0 takes `hidden` / `top_k`, which keeps the active FLOPs of the dense model."""
    shared_expert_hidden: int = 0
    """Width inside the expert that every token goes to; 0 has none."""
    dense_layers: int = 0
    """First blocks whose feed-forward stays dense."""
    router: str = "softmax"
    """Scores of the experts: `softmax` over all of them, or `sigmoid` of each."""
    renormalize: bool = True
    """The weights of a token's experts sum to 1."""
    balance: str = "auxiliary"
    """What keeps experts evenly used: `auxiliary` loss, `bias` on the scores that choose, or `none`."""
    balance_weight: float = 0.01
    """Weight of the auxiliary loss, or step of the bias."""
    router_z_loss: float = 1e-3
    """Weight of the router's squared log-partition."""
    exportable_to: str = ""
    """Hugging Face class that the model must fit, checked before training: `llama`, `qwen3`, `qwen3-moe`, `mixtral` or
    `t5`; empty asks for none."""


@dataclass(frozen=True)
class Denoiser:
    """One task of a mixture of objectives."""

    kind: str = "span"
    """`span` (corruption, as in T5), `prefix` or `causal`."""
    weight: float = 1.0
    """Share of the pieces of documents, relative to the others."""
    rate: float = 0.15
    """Share of a document's tokens that become targets; for `prefix` their mean share."""
    mean_span: float = 3.0
    """Mean length of a corrupted span, in tokens."""
    roll: bool = False
    """Rotate the corruption, so that a document may begin or end either way."""
    mode: str = ""
    """Mode token put before the inputs: `R`, `S`, `X`, or empty for none."""


@dataclass(frozen=True)
class Objective:
    """What is predicted, and what else the loss holds."""

    kind: str = "causal"
    """`causal` (each token from those before it), `prefix`, `span` (T5), `ul2`, `ul2r`, or `mixture` (`denoisers`)."""
    rate: float = 0.15
    """For `span`: share of the tokens that are corrupted."""
    mean_span: float = 3.0
    """For `span`: mean length of a corrupted span, in tokens."""
    mode_tokens: bool = True
    """For `ul2` and `ul2r`: put the denoiser's mode token before the inputs."""
    denoisers: tuple[Denoiser, ...] = ()
    """For `mixture`: its tasks."""
    z_loss: float = 1e-4
    """Weight of the squared log-partition of the softmax; keeps logits from drifting."""


@dataclass(frozen=True)
class Optimizer:
    """How gradients become updates."""

    name: str = "muon"
    """`muon` (matrices of the blocks by Muon, everything else by AdamW), `adamw`, or `file.py:Class`."""
    learning_rate: float = 0.02
    """Peak learning rate of the blocks' matrices at `base_width`."""
    embedding_learning_rate: float = 0.0
    """Peak learning rate of the embedding; 0 takes the optimizer's default relation to `learning_rate`."""
    head_learning_rate: float = 0.0
    """Peak learning rate of the head at `base_width`; 0 as above."""
    vector_learning_rate: float = 0.0
    """Peak learning rate of gains and of T5's tables of positions; 0 as above."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the blocks' matrices; nothing else decays."""
    momentum: float = 0.95
    """Muon's momentum."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    transfer: str = "width"
    """`width` scales learning rates from `base_width` so that the best stays put; `none` applies what is written."""
    base_width: int = 256
    """Width at which the learning rates were tuned."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate over the run."""

    kind: str = "wsd"
    """`wsd` (warmup, stable, decay), `cosine` or `constant`."""
    warmup: float = 0.02
    """Share of the run's steps spent rising from 0."""
    decay: float = 0.4
    """Share of the run's steps spent falling, for `wsd`."""
    final: float = 0.0
    """Learning rate at the end as a share of the peak."""


@dataclass(frozen=True)
class Ramp:
    """A smaller batch at the beginning of a run: the size that pays grows as the loss falls (McCandlish et al. 2018,
    arXiv 1812.06162)."""

    tokens: int = 0
    """Tokens an update; a multiple of `model.context`, at most `batch.tokens`."""
    until: float = 0.0
    """Share of the run's tokens, in (0, 1), after which the next stage begins, or `batch.tokens`."""


@dataclass(frozen=True)
class Batch:
    """How much one update sees."""

    tokens: int = 8192
    """Tokens an update, over all ranks; a multiple of `model.context`."""
    ramp: tuple[Ramp, ...] = ()
    """Smaller batches before these, in stages; needs `duration.tokens`."""


@dataclass(frozen=True)
class Duration:
    """How long the run is: exactly one is set."""

    tokens: int = 0
    """Training tokens."""
    flops: float = 0.0
    """Training FLOPs by the structure of the model."""
    minutes: float = 0.0
    """Wall-clock of the training loop; measured at the first start and kept as tokens in probes.json."""


@dataclass(frozen=True)
class Parallel:
    """How the arithmetic is laid out; may change on the way."""

    micro_tokens: int = 0
    """Tokens one forward pass of one rank sees; a divisor of the batch. 0 takes what is known to be quick here."""
    dtype: str = "auto"
    """Type of the matmuls: `auto` (a probe decides), `bfloat16` or `float32`. Master weights are float32 always."""
    compile: str = "auto"
    """`auto` (a probe decides), `on` or `off`: torch.compile of each block."""
    threads: int = 0
    """CPU threads; 0 takes the cores that this process may use."""
    replicate: int = 0
    """Copies of the weights; `replicate` × `shard` × `context` × `tensor` is the number of ranks. 0 takes what the
    others leave."""
    shard: int = 0
    """Ranks that share one copy of the weights, gradients and optimizer state (FSDP, or HSDP where there are several
    copies). 1 shares nothing; 0 takes as few as the memory of a rank needs, by arithmetic."""
    tensor: int = 1
    """Ranks that share every matrix, by heads and by columns of the feed-forward; they see the same tokens."""
    context: int = 1
    """Ranks that share the positions of each sequence."""
    expert: int = 1
    """Ranks that share the experts; divides `replicate` × `shard` × `context`."""
    activation_checkpointing: str = "none"
    """What the backward pass computes again instead of keeping it: `none`, `selective` (what is cheap: only the
    products of attention and feed-forward are kept) or `full` (all but each block's input)."""
    float8: bool = False
    """The blocks' matmuls in float8; needs a CUDA GPU that has it, and torchao."""


@dataclass(frozen=True)
class Checkpoint:
    """When the state is saved; may change on the way."""

    every_steps: int = 0
    """Save each so many steps; 0 leaves it to `every_minutes`."""
    every_minutes: float = 10.0
    """Save when so long has passed since the last save; 0 saves only at the end."""
    keep: int = 2
    """Newest checkpoints kept, and one besides where all of them turned out damaged."""
    keep_every_steps: int = 0
    """Checkpoints of steps that this divides are kept besides; 0 keeps none for that."""
    keep_best: int = 0
    """So many checkpoints are kept besides that have the lowest held-out bits per byte."""
    keep_bytes: int = 0
    """Most bytes of all checkpoints together (`500GB`), above which the oldest of those kept besides go first; the
    newest stays whatever its size. 0 sets no bound."""
    asynchronous: bool = True
    """A checkpoint is copied to host memory and written while the next steps go on."""
    remote: str = ""
    """Path or fsspec URL (`s3://BUCKET/FOLDER`) to which every checkpoint is copied in the background; empty copies
    none."""


@dataclass(frozen=True)
class Evals:
    """What is measured during the run; may change on the way."""

    every_steps: int = 0
    """Held-out loss each so many steps; 0 takes a tenth of the run, less often where minutes are few. The last step is
    always measured."""
    tokens: int = 65_536
    """Held-out tokens a source for each measurement during the run."""
    final_tokens: int = 0
    """Held-out tokens a source after the last step; 0 takes all."""
    prompts: tuple[str, ...] = ()
    """Prompts completed at each measurement, for samples.jsonl."""
    sample_tokens: int = 64
    """Length of such a completion."""
    norms_every_steps: int = 0
    """Norms of gradients, updates and activations by layer each so many steps; 0 never."""


@dataclass(frozen=True)
class Recipe:
    """All that decides a run."""

    name: str = ""
    """Name of the run directory, unless `--name` gives another."""
    seed: int = 0
    """Seed of the initialisation and of the order of the data."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    batch: Batch = field(default_factory=Batch)
    duration: Duration = field(default_factory=Duration)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evals: Evals = field(default_factory=Evals)


IDENTITY_EXCLUDES = ("name", "parallel", "checkpoint", "evals", "data.skip")
"""Keys that may change between incarnations of one run (design: Contracts, Recipe)."""
