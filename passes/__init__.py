"""Graph rewrites, in the order in which they run. One literal list; each pass is one file."""

assert __name__ == "qcompile.passes", "import this package as qcompile.passes"

from qcompile.passes.annotate import annotate
from qcompile.passes.context import Decline, GraphContext, Pass, Rewrite
from qcompile.passes.fuse_epilogue import fuse_epilogue
from qcompile.passes.fuse_gate import fuse_gate
from qcompile.passes.fuse_sums import fuse_sums
from qcompile.passes.merge_counters import merge_counters
from qcompile.passes.merge_projections import merge_projections
from qcompile.passes.normalize import normalize
from qcompile.passes.quantize_attention import quantize_attention
from qcompile.passes.quantize_linear import quantize_linear
from qcompile.passes.quantize_norms import quantize_norms
from qcompile.passes.rotate_positions import rotate_positions
from qcompile.passes.share_heads import share_heads
from qcompile.passes.share_quantization import share_quantization
from qcompile.passes.store_codes import store_codes
from qcompile.passes.verify import verify

PASSES: tuple[Pass, ...] = (
    normalize,
    annotate,
    merge_projections,
    quantize_linear,
    quantize_attention,
    share_heads,
    merge_counters,
    rotate_positions,
    fuse_gate,
    fuse_epilogue,
    store_codes,
    quantize_norms,
    fuse_sums,
    share_quantization,
    verify,
)

__all__ = ["PASSES", "Decline", "GraphContext", "Pass", "Rewrite"]
