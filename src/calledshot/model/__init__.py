"""The trunk: layers, attention and masks, loss, cache, generation; Hugging Face in and out."""

from calledshot.model.block import Block
from calledshot.model.cache import Cache
from calledshot.model.decoder import Decoder, Reading
from calledshot.model.encoder import EncoderInputs
from calledshot.model.engine import Engine, Overloaded
from calledshot.model.evaluate import BatchTensors, batch_nats, document_nats
from calledshot.model.generation import Completion, Decoding, Logprob, Request, generate, steps
from calledshot.model.prompting import continuing
from calledshot.model.sampling import Sampling, banned_tokens

__all__ = [
    "BatchTensors",
    "Block",
    "Cache",
    "Completion",
    "Decoder",
    "Decoding",
    "EncoderInputs",
    "Engine",
    "Logprob",
    "Overloaded",
    "Reading",
    "Request",
    "Sampling",
    "banned_tokens",
    "batch_nats",
    "continuing",
    "document_nats",
    "generate",
    "steps",
]
