"""The lab's special tokens in another model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calledshot.data import Tokenizer
from calledshot.data.tokenizer import BEGIN, END, PAD, SENTINELS, SPECIALS
from calledshot.recipe import RunError, UsageError
from calledshot.rundir import read_json

APART = {"type": "Split", "pattern": {"Regex": r"<(?=\|)"}, "behavior": "Isolated", "invert": False}
"""Keeps text from being read as the name of a token that stands in a model's own vocabulary."""


@dataclass(frozen=True)
class Adopted:
    """A tokenizer with the lab's special tokens, and where each came from."""

    tokenizer: Tokenizer
    known: int
    """Ids that the folder's own tokenizer has: the highest plus one."""
    new: tuple[int, ...]
    """Ids that mean something now and did not before."""
    twin: int | None
    """The id that begins texts in the model, where another part keeps it; None where begin has it."""
    renamed: dict[str, str]
    """The lab's name by the token's own."""


def adopt(folder: Path, config: Mapping[str, Any]) -> Adopted:
    """A folder's tokenizer, its own special tokens under the lab's names wherever it has them, the others above.

    | ours | theirs |
    |---|---|
    | end | `eos_token_id`, of several the first |
    | begin | `decoder_start_token_id`, else `bos_token_id` |
    | pad | `pad_token_id` |
    | sentinel k | `<extra_id_k>`, T5's k-th |

    An id has one name. One that has two parts to play (T5 begins with its padding, Qwen with its end) is called after
    the first in this table, and the other gets an id of its own. What config.json does not say is looked up in
    tokenizer_config.json. UsageError where there is no tokenizer.json.
    """
    file = folder / "tokenizer.json"
    description = read_json(file)
    if description is None:
        way_out = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        raise UsageError(f"{file}: is missing; `transformers` writes it: {way_out}")
    try:
        names = _names(description)
        wanted = _wanted(config, read_json(folder / "tokenizer_config.json", {}), names)
        renames, twin = _renames(wanted, names)
        known = max(names) + 1
        renamed = Tokenizer.from_json(json.dumps(_renamed(description, renames)), str(file))
        if set(renamed.encode("".join(SPECIALS))) & set(renamed.special.values()):
            _keep_apart(description)
            renamed = Tokenizer.from_json(json.dumps(description), str(file))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunError(f"{file}: is not a tokenizer.json as `tokenizers` writes it ({error!r})") from error
    new = tuple(id_ for name, id_ in renamed.special.items() if name not in names.values() and id_ not in renames)
    return Adopted(
        renamed,
        known,
        new,
        twin,
        {names[id_]: name for id_, name in renames.items()},
    )


def _names(description: Mapping[str, Any]) -> dict[int, str]:
    """Every token by id."""
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, list):
        names = {id_: piece[0] for id_, piece in enumerate(vocabulary)}
    else:
        names = {id_: token for token, id_ in vocabulary.items()}
    return names | {token["id"]: token["content"] for token in description.get("added_tokens") or ()}


def _wanted(config: Mapping[str, Any], settings: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, int]:
    """Id of the token that plays each part, those first that keep their ids."""
    ids = {name: id_ for id_, name in names.items()}

    def find(*keys: str) -> int | None:
        for key in keys:
            id_ = config.get(f"{key}_token_id")
            id_ = next(iter(id_), None) if isinstance(id_, list) else id_
            token = settings.get(f"{key}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if id_ is None and token in ids:
                id_ = ids[token]
            if id_ in names:
                return id_
        return None

    parts = {END: find("eos"), BEGIN: find("decoder_start", "bos"), PAD: find("pad")}
    parts |= {name: ids.get(f"<extra_id_{number}>") for number, name in enumerate(SENTINELS)}
    return {name: id_ for name, id_ in parts.items() if id_ is not None and name not in ids}


def _renames(wanted: Mapping[str, int], names: Mapping[int, str]) -> tuple[dict[int, str], int | None]:
    """New names by id, and the id that begin would have had if it could. The lab's own names stay."""
    renames: dict[int, str] = {}
    for name, id_ in wanted.items():
        if names[id_] not in SPECIALS:
            renames.setdefault(id_, name)
    begin = wanted.get(BEGIN)
    return renames, begin if begin is not None and renames.get(begin) != BEGIN else None


def _renamed(description: dict[str, Any], renames: Mapping[int, str]) -> dict[str, Any]:
    """The tokenizer with other names for some ids, in place."""
    model = description["model"]
    vocabulary, added = model["vocab"], description.setdefault("added_tokens", [])
    before = _names(description)
    for id_, name in renames.items():
        if isinstance(vocabulary, list) and id_ < len(vocabulary):
            vocabulary[id_] = [name, *vocabulary[id_][1:]]
        elif isinstance(vocabulary, dict) and before[id_] in vocabulary:
            vocabulary[name] = vocabulary.pop(before[id_])
        if model.get("unk_token") == before[id_]:
            model["unk_token"] = name
        entry = next((token for token in added if token["id"] == id_), None)
        if entry is None:
            entry = {"id": id_, "single_word": False, "lstrip": False, "rstrip": False}
            added.append(entry)
        entry |= {"content": name, "normalized": False, "special": True}
    added.sort(key=lambda token: token["id"])
    if renames:
        # It would put tokens around a text, under their old names; documents get theirs from the lab.
        description["post_processor"] = None
    return description


def _keep_apart(description: dict[str, Any]) -> None:
    """Another step of the pre-tokenizer, after its own."""
    own = description.get("pre_tokenizer")
    steps = own["pretokenizers"] if own and own["type"] == "Sequence" else [own] if own else []
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, APART]}
