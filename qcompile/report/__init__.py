"""What each layer of a model becomes, and why."""

from qcompile.report.explain import Explanation, LayerReport, explain

__all__ = ["Explanation", "LayerReport", "explain"]
