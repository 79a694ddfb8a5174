"""A Hugging Face folder as a model to train on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from calledshot.data import Tokenizer
from calledshot.model.decoder import Decoder
from calledshot.model.huggingface.configs import read_config, read_model, scales_logits
from calledshot.model.huggingface.files import read_weights
from calledshot.model.huggingface.layouts import from_huggingface, to_huggingface
from calledshot.model.huggingface.tokens import Adopted, adopt
from calledshot.recipe import UsageError, schema

COMPUTED = ("rotary_emb.inv_freq", "EncDecAttention.relative_attention_bias.weight")
"""Ends of names in old files of tensors that are computed, or that nothing reads."""
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Names under which old files of T5 hold the embedding again."""
NOISE = 0.1
"""Of new rows, in standard deviations of the old ones."""


@dataclass(frozen=True)
class Imported:
    """A model with the lab's special tokens."""

    model: schema.Model
    state: dict[str, Tensor]
    """The Decoder's state dict, float32."""
    tokenizer: Tokenizer
    renamed: dict[str, str]
    """The lab's name of each token that had another, by that name."""
    new_rows: int
    """Rows of the embedding that stand for tokens the model has never seen."""


def import_huggingface(folder: Path) -> Imported:
    """Read a folder with its tokenizer, and give the embedding and the head a row for each token that is missing.

    The model's own begin, end and padding tokens and T5's sentinels get the lab's names and keep their ids and rows
    (`adopt`). Every other new row is the mean of the old ones plus normal noise of a tenth of their standard deviation,
    by column: next to nothing is taken from the tokens that the model knows (Hewitt 2021, "Initializing new word
    embeddings for pretrained language models"), and no two rows are alike. Rows are rounded up to a multiple of 64. A
    begin that shares the id of the end gets a row of its own, which is read as that one is; where head and embedding
    are one matrix it takes half of the end's probability with it, until it is trained.

    UsageError where the folder holds another kind of model, RunError where its files are damaged.
    """
    read_model(folder)  # what cannot be read is told before the tokenizer is looked at
    adopted = adopt(folder, read_config(folder))
    model, state = load_huggingface(folder)
    if adopted.known > model.vocabulary:
        raise UsageError(
            f"{folder}: its tokenizer has {adopted.known:,} entries, its embedding only {model.vocabulary:,} rows"
        )
    vocabulary = max(model.vocabulary, -(-adopted.tokenizer.size // 64) * 64)
    state = {name: tensor.float() for name, tensor in state.items()}
    generator = torch.Generator().manual_seed(0)
    for name in ("embedding_VD", "separate_head_VD"):
        if name in state:
            state[name] = _grown(state[name], vocabulary, adopted, generator)
    if adopted.twin is not None:
        state["embedding_VD"][adopted.tokenizer.begin] = state["embedding_VD"][adopted.twin]
    return Imported(replace(model, vocabulary=vocabulary), state, adopted.tokenizer, adopted.renamed, len(adopted.new))


def _grown(old_VD: Tensor, vocabulary: int, adopted: Adopted, generator: torch.Generator) -> Tensor:
    known_VD = old_VD[: adopted.known]
    mean_D, deviation_D = known_VD.mean(0), known_VD.std(0)
    new = sorted({*adopted.new, *range(len(old_VD), vocabulary)})
    grown_VD = torch.cat((old_VD, old_VD.new_empty(vocabulary - len(old_VD), old_VD.size(1))))
    noise = torch.randn(len(new), old_VD.size(1), generator=generator)
    grown_VD[new] = mean_D + NOISE * deviation_D * noise
    return grown_VD


def load_huggingface(folder: Path) -> tuple[schema.Model, dict[str, Tensor]]:
    """The recipe's `model` section and the Decoder's state dict, in the file's dtypes, of a folder as it is.

    UsageError where the folder holds another kind of model, RunError where its files are damaged.
    """
    config, weights = read_model(folder), read_weights(folder)
    if config.topology == "encoder-decoder":
        config = replace(config, tied_embeddings=_tied(weights))
    with torch.device("meta"):
        expected = dict(to_huggingface(config, Decoder(config).state_dict()))
    if config.tied_embeddings:  # its file may hold the head all the same, or not
        expected.pop("lm_head.weight", None)
        weights.pop("lm_head.weight", None)
    for key, like in expected.items():
        if key not in weights:
            raise UsageError(f"{folder}: has no tensor {key!r}, which its config.json asks for")
        if weights[key].shape != like.shape:
            found, wanted = tuple(weights[key].shape), tuple(like.shape)
            raise UsageError(f"{folder}: {key!r} has the shape {found} where its config.json says {wanted}")
    strange = [key for key in weights if key not in expected and key not in COPIES and not key.endswith(COMPUTED)]
    if strange:
        raise UsageError(f"{folder}: holds {strange[0]!r}, which this trunk has no place for")
    state = from_huggingface(config, weights)
    if config.topology == "encoder-decoder" and scales_logits(read_config(folder)):
        state["final_norm_D"] = state["final_norm_D"] * config.width**-0.5
    return config, state


def _tied(weights: Mapping[str, Tensor]) -> bool:
    """Whether T5's head is its embedding: its configuration says so always."""
    head, embedding = weights.get("lm_head.weight"), weights.get("shared.weight")
    return head is None or (embedding is not None and torch.equal(head, embedding))
