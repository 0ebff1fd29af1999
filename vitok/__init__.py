"""vitok: a visual tokenizer made of plain Vision Transformers (ViTok, arXiv:2501.09755) on fused kernels."""

from vitok.checkpoint import create_model, list_models, load
from vitok.config import ViTokConfig
from vitok.count import Count, count
from vitok.errors import InputError
from vitok.model import ViTok

__version__ = "0.1.0"

__all__ = ["Count", "InputError", "ViTok", "ViTokConfig", "__version__", "count", "create_model", "list_models", "load"]
