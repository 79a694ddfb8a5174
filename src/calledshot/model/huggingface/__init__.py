"""Hugging Face folders, in and out: Llama, Qwen3, Qwen3-MoE, Mixtral and T5; `transformers` is not needed."""

from calledshot.model.huggingface.configs import read_model
from calledshot.model.huggingface.exporting import architecture, export_huggingface
from calledshot.model.huggingface.importing import Imported, import_huggingface, load_huggingface
from calledshot.model.huggingface.layouts import from_huggingface, to_huggingface

__all__ = [
    "Imported",
    "architecture",
    "export_huggingface",
    "from_huggingface",
    "import_huggingface",
    "load_huggingface",
    "read_model",
    "to_huggingface",
]
