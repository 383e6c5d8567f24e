"""From a quantized linear's description to the source of a GPU kernel.

`spec` says what decides a kernel, `templates` are kernels with holes, `printers` turn formulas into Triton, `render`
fills the holes, and `cost_model` proposes tiles. Nothing here launches anything or imports Triton, templates aside.
"""

assert __name__ == "qcompile.codegen", "import qcompile.codegen, not the folder it lies in"
