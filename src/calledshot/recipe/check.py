"""What makes a recipe impossible although every key is of its type; each problem is one line with the way out."""

import operator
from collections.abc import Iterable, Iterator

from .derived import shape, source_names
from .errors import UsageError
from .export import export_problems
from .layout import parallel_problems
from .objectives import KINDS, objective_problems
from .schema import Data, Model, Recipe

POSITIVE = {
    "model": ("layers", "width", "heads", "kv_heads", "context", "rope_base", "norm_epsilon", "top_k", "rope_factor"),
    "optimizer": ("learning_rate", "epsilon", "base_width"),
    "batch": ("tokens",),
    "parallel": ("tensor", "context", "expert"),
    "evals": ("tokens", "sample_tokens"),
}
NOT_NEGATIVE = {
    "model": (
        *("head_width", "hidden", "vocabulary", "softcap", "encoder_layers", "encoder_width", "encoder_hidden"),
        *("encoder_context", "rope_original_context", "experts", "expert_hidden", "shared_expert_hidden"),
        *("dense_layers", "balance_weight", "router_z_loss"),
    ),
    "objective": ("z_loss",),
    "optimizer": ("embedding_learning_rate", "head_learning_rate", "vector_learning_rate", "weight_decay", "clip"),
    "duration": ("tokens", "flops", "minutes"),
    "parallel": ("micro_tokens", "threads", "replicate", "shard"),
    "checkpoint": ("every_steps", "every_minutes", "keep", "keep_every_steps", "keep_best", "keep_bytes"),
    "evals": ("every_steps", "final_tokens", "norms_every_steps"),
}
SHARES = {"schedule": ("warmup", "decay", "final")}
DECAYS = {"optimizer": ("momentum", "beta1", "beta2")}
CHOICES = {
    "model.topology": ("decoder", "prefix", "encoder-decoder"),
    "model.encoder_pooling": (1, 2, 4, 8),
    "model.positions": ("rope", "t5", "none"),
    "model.rope_scaling": ("none", "ntk", "dynamic", "yarn", "llama3"),
    "model.norm": ("rmsnorm", "layernorm"),
    "model.norm_placement": ("pre", "post", "sandwich"),
    "model.feed_forward": ("swiglu", "geglu", "gelu", "relu2"),
    "model.router": ("softmax", "sigmoid"),
    "model.balance": ("auxiliary", "bias", "none"),
    "model.exportable_to": ("", "llama", "qwen3", "qwen3-moe", "mixtral", "t5"),
    "objective.kind": KINDS,
    "optimizer.transfer": ("width", "none"),
    "schedule.kind": ("wsd", "cosine", "constant"),
    "parallel.dtype": ("auto", "bfloat16", "float32"),
    "parallel.compile": ("auto", "on", "off"),
    "parallel.activation_checkpointing": ("none", "selective", "full"),
}
ENCODERS = ("encoder_layers", "encoder_width", "encoder_hidden", "encoder_context", "encoder_pooling")
EXPERTS = (
    *("top_k", "expert_hidden", "shared_expert_hidden", "dense_layers", "router", "renormalize"),
    *("balance", "balance_weight", "router_z_loss"),
)
FORMATS = ("auto", "text", "jsonl", "parquet")
LARGEST_SEED = 2**63
LEAST_VOCABULARY = 525
"""256 bytes and what every tokenizer reserves (`data.tokenizer.SMALLEST`)."""
MOST_THREADS = 1024
MOST_POSITIONS = 1 << 24
MOST_LAYERS = 10_000
"""More than any machine has use for; far more make torch crash."""


def check(recipe: Recipe, where: str = "recipe") -> None:
    """Raises: `UsageError` with the first problem."""
    for problem in problems(recipe):
        raise UsageError(f"{where}: {problem}")


def problems(recipe: Recipe) -> Iterator[str]:
    """Everything that keeps the recipe from running, found by arithmetic alone."""
    bad = list(ranges(recipe))
    yield from bad
    yield from data_problems(recipe.data)
    if bad:
        return
    yield from model_problems(recipe.model, recipe.data.tokenizer)
    yield from export_problems(recipe)
    yield from objective_problems(recipe)
    yield from length_problems(recipe)
    yield from parallel_problems(recipe)


def ranges(recipe: Recipe) -> Iterator[str]:
    """Values outside their range, one key at a time."""
    rules = (
        (POSITIVE, lambda value: value > 0, "must be more than 0"),
        (NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
        (SHARES, lambda value: 0 <= value <= 1, "is a share of the run: 0 to 1"),
        (DECAYS, lambda value: 0 <= value < 1, "must be at least 0 and less than 1"),
    )
    for sections, holds, rule in rules:
        for section, keys in sections.items():
            for key in keys:
                value = getattr(getattr(recipe, section), key)
                if not holds(value):
                    yield f"{section}.{key} = {value} {rule}"
    for key, choices in CHOICES.items():
        value = operator.attrgetter(key)(recipe)
        if value not in choices:
            named = " or ".join(str(choice) for choice in choices if choice != "")
            yield f"{key} = {value!r}: choose {named}{', or leave it empty for none' if '' in choices else ''}"
    name = recipe.optimizer.name
    if name not in ("muon", "adamw") and ".py:" not in name:
        yield f"optimizer.name = {name!r}: choose muon, adamw or FILE.py:CLASS"
    for key in ("context", "encoder_context"):
        if (context := getattr(recipe.model, key)) > MOST_POSITIONS:
            yield f"model.{key} = {context} is more than {MOST_POSITIONS}, past which float32 cannot count positions"
    if recipe.model.layers > MOST_LAYERS:
        yield f"model.layers = {recipe.model.layers} is more than {MOST_LAYERS}"
    if recipe.parallel.threads > MOST_THREADS:
        yield f"parallel.threads = {recipe.parallel.threads} is more than {MOST_THREADS}; 0 takes the cores there are"
    if not 0 <= recipe.seed < LARGEST_SEED:
        yield f"seed = {recipe.seed} must be at least 0 and less than 2^63"


def model_problems(model: Model, tokenizer: str) -> Iterator[str]:
    """Shapes that do not fit together."""
    width, heads = model.width, model.heads
    if not model.head_width and width % heads:
        lower = width // heads * heads
        near = f"{lower} or {lower + heads}" if lower else f"{heads}"
        yield (
            f"model.width = {width} is not a multiple of model.heads = {heads}: take a width of {near}, "
            "or set model.head_width"
        )
    elif (head_width := shape(model).head_width) % 2 and model.positions == "rope":
        even = f"set an even one, model.head_width={head_width + 1}"
        yield f"a head's width of {head_width} is odd, and RoPE turns pairs: {even}"
    if heads % model.kv_heads:
        fitting = ", ".join(str(number) for number in range(1, heads + 1) if heads % number == 0)
        yield f"model.kv_heads = {model.kv_heads} does not divide model.heads = {heads}: take one of {fitting}"
    yield from encoder_problems(model)
    yield from rope_problems(model)
    yield from expert_problems(model) if model.experts else unread(model, EXPERTS, "experts", "set model.experts")
    if tokenizer == "bpe" and 0 < model.vocabulary < LEAST_VOCABULARY:
        yield (
            f"model.vocabulary = {model.vocabulary} is too small: bytes and special tokens take {LEAST_VOCABULARY}, so "
            f"set at least {LEAST_VOCABULARY}"
        )
    if tokenizer == "bpe" and not model.vocabulary:
        yield "model.vocabulary = 0 needs a tokenizer that exists: set its size, or data.tokenizer to a tokenizer.json"


def unread(model: Model, keys: Iterable[str], whose: str, instead: str) -> Iterator[str]:
    """Keys that were set and that nothing would read: `whose` they are, and what to do `instead`."""
    for key in keys:
        if (value := getattr(model, key)) != getattr(Model(), key):
            yield f"model.{key} = {value} is for {whose}, and there is none: {instead}, or leave model.{key} out"


def encoder_problems(model: Model) -> Iterator[str]:
    """Encoders that cannot be, and keys of one that is not there."""
    if model.topology != "encoder-decoder":
        yield from unread(model, ENCODERS, "an encoder", "set model.topology=encoder-decoder")
        return
    found = shape(model)
    if model.heads % model.kv_heads or found.encoder is None:
        return
    group = found.head_width * (model.heads // model.kv_heads)
    if found.encoder_width != model.width and found.encoder_width % group:
        near = max(1, round(found.encoder_width / group)) * group
        yield (
            f"model.encoder_width = {found.encoder_width} is not a multiple of {group}, a key head with its query "
            f"heads: take {near}"
        )
    if model.encoder_pooling.bit_length() > found.encoder_layers:
        yield (
            f"model.encoder_pooling = {model.encoder_pooling} halves between layers, and there are only "
            f"{found.encoder_layers}: take {1 << (found.encoder_layers - 1)}, or more model.encoder_layers"
        )


def rope_problems(model: Model) -> Iterator[str]:
    """RoPE that cannot turn, and extensions of it that do not say from where."""
    if model.positions == "rope" and model.rope_base <= 1.0:
        yield f"model.rope_base = {model.rope_base:g} must be more than 1: 10000 is usual"
    if model.rope_scaling == "none":
        scaling = "set model.rope_scaling to ntk, dynamic, yarn or llama3"
        yield from unread(model, ("rope_factor", "rope_original_context"), "a scaling of RoPE", scaling)
        return
    if model.positions != "rope":
        yield f"model.rope_scaling = {model.rope_scaling!r} scales RoPE, and model.positions is {model.positions!r}"
    if not 0 < model.rope_original_context <= model.context:
        yield (
            f"model.rope_scaling = {model.rope_scaling!r} needs model.rope_original_context, the length trained at, "
            f"at most model.context = {model.context}; it is {model.rope_original_context}"
        )
    if model.rope_scaling in ("ntk", "dynamic") and shape(model).head_width < 4:
        yield (
            f"model.rope_scaling = {model.rope_scaling!r} raises the base by the other pairs of a head, and one of "
            f"{shape(model).head_width} has none: take yarn, or wider heads"
        )
    if model.rope_factor < 1.0:
        yield f"model.rope_factor = {model.rope_factor} must be at least 1"


def expert_problems(model: Model) -> Iterator[str]:
    """Routers that cannot choose, or cannot learn to."""
    if model.top_k > model.experts:
        yield (
            f"model.top_k = {model.top_k} is more than model.experts = {model.experts}: set "
            f"model.top_k={model.experts}, or model.experts={model.top_k}"
        )
    if model.dense_layers >= model.layers:
        yield (
            f"model.dense_layers = {model.dense_layers} leaves none of model.layers = {model.layers} to the experts: "
            "lower it, or set model.experts=0"
        )
    if model.top_k == 1 and model.renormalize:
        yield (
            "model.renormalize makes the weight of a single expert always 1, so that the router learns nothing: set "
            "model.renormalize=false, or model.top_k=2"
        )


def length_problems(recipe: Recipe) -> Iterator[str]:
    """Batch, duration and schedule against each other and against the context."""
    batch, context, micro = recipe.batch.tokens, shape(recipe.model).row_positions, recipe.parallel.micro_tokens
    two = recipe.model.topology == "encoder-decoder"
    called = "model.encoder_context + model.context" if two else "model.context"
    if batch % context:
        near = max(1, round(batch / context)) * context
        yield f"batch.tokens = {batch} is not a multiple of {called} = {context}: take {near}"
    elif micro and (batch % micro or micro % context):
        rows = batch // context
        fitting = max((n for n in range(1, rows + 1) if rows % n == 0 and n * context <= micro), default=1) * context
        yield (
            f"parallel.micro_tokens = {micro} must divide batch.tokens = {batch} and be a multiple of {called} = "
            f"{context}: take {fitting}"
        )
    yield from ramp_problems(recipe, context, called)
    duration = recipe.duration
    given = [key for key in ("tokens", "flops", "minutes") if getattr(duration, key)]
    if len(given) != 1:
        found = " and ".join(given) if given else "none"
        yield f"duration: exactly one of tokens, flops and minutes says how long the run is; found {found}"
    elif duration.tokens and duration.tokens < batch:
        yield (
            f"duration.tokens = {duration.tokens} is less than batch.tokens = {batch}: train longer "
            "or take a smaller batch"
        )
    schedule = recipe.schedule
    if schedule.kind == "wsd" and schedule.warmup + schedule.decay > 1 + 1e-9:
        yield (
            f"schedule.warmup = {schedule.warmup} and schedule.decay = {schedule.decay} together are more than the "
            "whole run: lower one"
        )


def ramp_problems(recipe: Recipe, context: int, called: str) -> Iterator[str]:
    """Stages of smaller batches that are none, or not in order."""
    ramp = recipe.batch.ramp
    if ramp and not recipe.duration.tokens:
        yield "batch.ramp: its stages are shares of the run's tokens: say how long the run is by duration.tokens"
    until = 0.0
    for place, stage in enumerate(ramp):
        key = f"batch.ramp.{place}"
        if not 0 < stage.tokens <= recipe.batch.tokens or stage.tokens % context:
            yield (
                f"{key}.tokens = {stage.tokens}: take a multiple of {called} = {context}, at most batch.tokens = "
                f"{recipe.batch.tokens}"
            )
        if not until < stage.until < 1:
            yield f"{key}.until = {stage.until:g}: take a share of the run's tokens between {until:g} and 1"
        until = stage.until


def data_problems(data: Data) -> Iterator[str]:
    """Mixtures that cannot be drawn from."""
    if not data.sources:
        yield "data.sources is empty: name at least one source"
        return
    for place, source in enumerate(data.sources):
        key = f"data.sources.{place}"
        if not source.path.strip():
            yield f"{key}.path is empty"
        if source.format not in FORMATS:
            yield f"{key}.format = {source.format!r}: choose {' or '.join(FORMATS)}"
        if source.modality != "text":
            yield f"{key}.modality = {source.modality!r}: only text is known so far"
        for name in ("weight", "max_epochs"):
            if getattr(source, name) < 0:
                yield f"{key}.{name} = {getattr(source, name)} must not be negative"
    names = source_names(data)
    for place, name in enumerate(names):
        if name in names[:place]:
            yield f"two sources are called {name}: give one another name with data.sources.{place}.name"
    weights = dict(zip(names, (source.weight for source in data.sources), strict=True))
    if all(weight == 0 for weight in weights.values()):
        yield "every data.sources weight is 0: give at least one source a weight"
    if not 0 < data.held_out < 1:
        yield f"data.held_out = {data.held_out} must be more than 0 and less than 1: the model is judged on it"
    if not data.tokenizer.strip():
        yield "data.tokenizer is empty: take bpe, a tokenizer.json or hf:OWNER/NAME"
    if any(step < 0 for step in data.skip) or len(set(data.skip)) < len(data.skip):
        yield f"data.skip = {list(data.skip)}: steps are counted from 0, each named once"
    before = -1.0
    for place, phase in enumerate(data.phases):
        key = f"data.phases.{place}"
        if not 0 <= phase.start < 1:
            yield f"{key}.start = {phase.start} is a share of the run: at least 0, less than 1"
        elif phase.start <= before:
            yield f"{key}.start = {phase.start} does not come after the phase before it ({before})"
        before = phase.start
        for name, weight in phase.weights.items():
            if name not in weights:
                yield f"{key}.weights names {name!r}, which is no source: there are {', '.join(names)}"
            if weight < 0:
                yield f"{key}.weights.{name} = {weight} must not be negative"
        if all(weight == 0 for weight in {**weights, **phase.weights}.values()):
            yield f"{key} leaves every source without weight"
