"""What a model reads of a conversation.

A base model has never seen turns: it reads the messages as plain text, joined by empty lines, and goes on with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from calledshot.data import Tokenizer

Role = Literal["system", "user", "assistant"]
Template = Literal["plain", "turns"]
"""`plain` for base models; `turns` for those trained on `<|role|>text<|turn_end|>`."""


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: Role
    text: str


def prompt(tokenizer: Tokenizer, messages: Sequence[Message], template: Template) -> tuple[int, ...]:
    """Token ids up to where the assistant's next turn begins. Nothing in a text can become a special token."""
    if template == "plain":
        return (tokenizer.begin, *tokenizer.encode("\n\n".join(message.text for message in messages)))
    ids = [tokenizer.begin]
    for message in messages:
        ids += [role(tokenizer, message.role), *tokenizer.encode(message.text), tokenizer.special["<|turn_end|>"]]
    return (*ids, role(tokenizer, "assistant"))


def role(tokenizer: Tokenizer, name: Role) -> int:
    """The token that opens a turn."""
    return tokenizer.special[f"<|{name}|>"]


def stop_tokens(tokenizer: Tokenizer, template: Template) -> frozenset[int]:
    """Tokens that end the assistant's turn."""
    return frozenset({tokenizer.end} if template == "plain" else {tokenizer.end, tokenizer.special["<|turn_end|>"]})
