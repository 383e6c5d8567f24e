"""What calibration says of each layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerResult:
    """A layer that calibration quantized.

    Attributes:
        name: of the layer; of a projection of a mixture's experts, which are one layer.
        scheme: what it became.
        method: how.
        error: the mean square of what its output errs by through the weight, over the output's mean square, on the
            calibration inputs; None where the method did not look at them.
        tokens: that it saw.
        folded: names of the parameters that took up its input's scales; empty where nothing was folded.
        declined: why a fold that its method names was not made; empty where it was, or none is named.
        note: what else is to be known of it; empty where nothing is.
        seconds: that choosing its codes took.
    """

    name: str
    scheme: str
    method: str
    error: float | None = None
    tokens: int = 0
    folded: tuple[str, ...] = ()
    declined: str = ""
    note: str = ""
    seconds: float = 0.0
