"""A run's model as a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from calledshot.model.huggingface.configs import written_config
from calledshot.model.huggingface.files import SHARD_BYTES, replace_model, to_json, write_weights
from calledshot.model.huggingface.layouts import to_huggingface
from calledshot.recipe import Recipe, UsageError, schema, shape
from calledshot.recipe.export import CLASSES, export_kind
from calledshot.rundir import atomic_write
from calledshot.rundir.drafts import draft_folder
from calledshot.rundir.files import write_failure

if TYPE_CHECKING:
    from calledshot.data import Tokenizer


def architecture(config: schema.Model, recipe: Recipe | None = None) -> str:
    """The class in `transformers` that computes the same function. UsageError where there is none, with the reason and
    with what would fit, in a run of this `recipe` where one is given."""
    return CLASSES[export_kind(config, recipe)]


def export_huggingface(
    folder: Path,
    config: schema.Model,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype = torch.float32,
    provenance: str = "",
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write a folder that `AutoModelForCausalLM` (`AutoModelForSeq2SeqLM` for an encoder-decoder) and `AutoTokenizer`
    load; gives its files.

    `state` is the Decoder's state dict; `provenance` a sentence for the model card. The folder appears whole or not at
    all. One that holds files is refused (UsageError) unless `force`: then the export replaces the model in it, and
    the rest stays. RunError when the disk is full, with what was there as it was.
    """
    architecture(config)  # what cannot be written is said before anything is
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not force)):
        raise UsageError(f"{folder}: is not empty; choose another folder, or add --force to replace the model in it")
    try:
        with draft_folder(folder) as draft:
            write_weights(draft, to_huggingface(config, state), dtype, shard_bytes)
            for file, content in _documents(config, state, tokenizer, dtype, provenance).items():
                atomic_write(draft / file, content)
            written = sorted(path.name for path in draft.iterdir())
            if folder.exists() and any(folder.iterdir()):
                replace_model(folder, draft)
            else:
                draft.rename(folder)
    except (OSError, SafetensorError) as error:
        raise write_failure(folder, error) from error
    return [folder / name for name in written]


def _documents(
    config: schema.Model, state: Mapping[str, Tensor], tokenizer: Tokenizer, dtype: torch.dtype, provenance: str
) -> dict[str, str]:
    """Every file but the weights, by name."""
    names = {id_: token for token, id_ in tokenizer.special.items()}
    specials = {
        "bos_token": names[tokenizer.begin],
        "eos_token": names[tokenizer.end],
        "pad_token": names[tokenizer.pad],
    }
    ids = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}
    written = written_config(config, state["embedding_VD"].size(0), ids, tokenizer.begin, dtype)
    starts = {key: written[key] for key in (*ids, "decoder_start_token_id", "use_cache") if key in written}
    return {
        "config.json": to_json(written),
        "generation_config.json": to_json(starts),
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": to_json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **specials,
                "model_max_length": shape(config).encoder_context or config.context,
                "clean_up_tokenization_spaces": False,
                # Text that spells a special token stays text, as in training.
                "split_special_tokens": True,
            }
        ),
        "special_tokens_map.json": to_json(specials),
        "README.md": _card(config, state, specials, provenance),
    }


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    """The tokenizer with a step that begins each text as every document in training began."""
    description = json.loads(tokenizer.to_json())
    begin = next(token for token, id_ in tokenizer.special.items() if id_ == tokenizer.begin)

    def piece(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": begin, "type_id": type_id}}, {"Sequence": {"id": sequence, "type_id": type_id}}]

    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": piece("A", 0),
        "pair": [*piece("A", 0), *piece("B", 1)],
        "special_tokens": {begin: {"id": begin, "ids": [tokenizer.begin], "tokens": [begin]}},
    }
    return to_json(description)


DECODER = """A base model: it continues text. Every document in training began with `{begin}` and ended with `{end}`.
The tokenizer adds the first of the two; text that spells a special token is read as text.
"""
PREFIX = """
In training a prefix was seen both ways. Without a 4-D additive attention mask that says so, this class reads it as it
reads everything, from the left alone.
"""
ENCODER_DECODER = """A base model: the encoder reads a text that begins with `{begin}`, and the decoder writes what the
text lacks, from `{begin}` to `{end}`. The tokenizer begins texts so. Text that spells a special token is read as text,
unless `split_special_tokens` is false.
"""
EXAMPLE = """
```python
from transformers import {loader}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = {loader}.from_pretrained(FOLDER)
prompt = tokenizer({text}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```
"""


def _card(config: schema.Model, state: Mapping[str, Tensor], specials: Mapping[str, str], provenance: str) -> str:
    """A model card that says what is known, and no more."""
    count = sum(tensor.numel() for tensor in state.values())
    loader, text, task = "AutoModelForCausalLM", '"Once upon a time"', "text-generation"
    depth, about = f"{config.layers} layers", DECODER
    if config.topology == "prefix":
        about += PREFIX
    elif config.topology == "encoder-decoder":
        loader, task = "AutoModelForSeq2SeqLM", "text2text-generation"
        text = '"Once upon a <|sentinel_0|>.", split_special_tokens=False'
        depth, about = f"{shape(config).encoder_layers} + {config.layers} layers", ENCODER_DECODER
    return f"""---
library_name: transformers
pipeline_tag: {task}
---

# {count / 1e6:,.1f}M-parameter language model

{provenance or "Trained with calledshot."}

`{architecture(config)}`, {count:,} parameters, {depth}, width {config.width}, context {config.context} tokens.

{about.format(begin=specials["bos_token"], end=specials["eos_token"])}{EXAMPLE.format(loader=loader, text=text)}"""
