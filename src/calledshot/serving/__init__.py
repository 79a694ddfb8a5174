"""HTTP only: the OpenAI-compatible endpoint, and what chat reads of a conversation."""

from calledshot.serving.app import application
from calledshot.serving.asked import Limits
from calledshot.serving.call import Served
from calledshot.serving.chat import Message, Template, prompt, stop_tokens
from calledshot.serving.server import listen, serve, url
from calledshot.serving.text import TextStream

__all__ = [
    "Limits",
    "Message",
    "Served",
    "Template",
    "TextStream",
    "application",
    "listen",
    "prompt",
    "serve",
    "stop_tokens",
    "url",
]
