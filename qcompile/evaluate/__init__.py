"""How good and how fast a quantized language model is, against its original."""

from qcompile.evaluate.models import LanguageModel, load_language_model, random_language_model, sample_text
from qcompile.evaluate.quality import Quality, compare, perplexity
from qcompile.evaluate.speed import Decoder, prefill_rate, weight_bytes

__all__ = [
    "Decoder",
    "LanguageModel",
    "Quality",
    "compare",
    "load_language_model",
    "perplexity",
    "prefill_rate",
    "random_language_model",
    "sample_text",
    "weight_bytes",
]
