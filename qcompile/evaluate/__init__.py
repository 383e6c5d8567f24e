"""How good and how fast a quantized language model is, against its original."""

from qcompile.evaluate.models import LanguageModel, load_language_model, random_language_model, sample_text
from qcompile.evaluate.quality import Quality, compare, perplexity
from qcompile.evaluate.recording import Recording, record
from qcompile.evaluate.run import Evaluation, evaluate, quantized_copy
from qcompile.evaluate.speed import Decoder, compiled_decoder, prefill_rate, weight_bytes

__all__ = [
    "Decoder",
    "Evaluation",
    "LanguageModel",
    "Quality",
    "Recording",
    "compare",
    "compiled_decoder",
    "evaluate",
    "load_language_model",
    "perplexity",
    "prefill_rate",
    "quantized_copy",
    "random_language_model",
    "record",
    "sample_text",
    "weight_bytes",
]
