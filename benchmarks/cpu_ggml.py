"""What `cpu.py` runs for products of llama.cpp: needs llama-cpp-python, whose ggml it calls, and no torch.

    python benchmarks/cpu_ggml.py N K ROWS THREADS COLD_BYTES

Prints a line of JSON for each number of rows (`1,4,32`) and each way in which ggml keeps a weight. Weights are rotated,
so that they come from memory, and are multiplied by float32, as in llama.cpp's graphs.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Iterator
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 8, "q4_k": 12}
FLOAT32 = 0
MOST_COPIES, CALLS, CHECKED = 96, 40, 4


class Parameters(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


class Traits(ctypes.Structure):
    """The begin of `ggml_type_traits`."""

    _fields_ = (
        ("name", c_char_p),
        ("block", c_int64),
        ("interleaved", c_int64),
        ("bytes", c_size_t),
        ("quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
    )


class Ggml:
    """The functions of ggml's libraries that are called here, by their names without `ggml_`."""

    def __init__(self) -> None:
        folder = Path(llama_cpp.__file__).parent / "lib"
        base, cpu, registry = (ctypes.CDLL(str(folder / f"lib{name}.so")) for name in ("ggml-base", "ggml-cpu", "ggml"))
        p, i, size = c_void_p, c_int64, c_size_t
        for library, name, result, *arguments in (
            (base, "init", p, Parameters),
            (base, "free", None, p),
            (base, "new_tensor_2d", p, p, c_int, i, i),
            (base, "mul_mat", p, p, p, p),
            (base, "new_graph", p, p),
            (base, "build_forward_expand", None, p, p),
            (base, "quantize_chunk", size, c_int, p, p, i, i, i, p),
            (base, "row_size", size, c_int, i),
            (base, "get_type_traits", POINTER(Traits), c_int),
            (base, "backend_alloc_ctx_tensors_from_buft", p, p, p),
            (base, "backend_buffer_free", None, p),
            (base, "backend_buft_name", c_char_p, p),
            (base, "backend_tensor_set", None, p, p, size, size),
            (base, "backend_tensor_get", None, p, p, size, size),
            (base, "backend_graph_compute", c_int, p, p),
            (base, "backend_dev_supports_op", c_bool, p, p),
            (base, "backend_get_device", p, p),
            (cpu, "backend_cpu_init", p),
            (cpu, "backend_cpu_set_n_threads", None, p, c_int),
            (base, "backend_cpu_buffer_type", p),
            (base, "backend_reg_get_proc_address", p, p, c_char_p),
            (base, "backend_dev_backend_reg", p, p),
        ):
            function = getattr(library, f"ggml_{name}", None) or getattr(registry, f"ggml_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)


def ways(ggml: Ggml, device: int) -> Iterator[tuple[str, int]]:
    """Kinds of memory for weights: the plain one, then those that lay codes out anew."""
    yield "", ggml.backend_cpu_buffer_type()
    address = ggml.backend_reg_get_proc_address(
        ggml.backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
    )
    kinds = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
    place = 0
    while kinds[place]:
        yield f", {ggml.backend_buft_name(kinds[place]).decode()}", kinds[place]
        place += 1


def measure(
    ggml: Ggml, name: str, n: int, k: int, rows: list[int], threads: int, cold: int
) -> Iterator[dict[str, Any]]:
    """The rows of a type."""
    backend = ggml.backend_cpu_init()
    ggml.backend_cpu_set_n_threads(backend, threads)
    device = ggml.backend_get_device(backend)
    kind = TYPES[name]
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((n, k), dtype=np.float32) / np.float32(k**0.5)
    codes = np.empty(n * ggml.row_size(kind, k), dtype=np.uint8)
    ggml.quantize_chunk(kind, weight.ctypes.data, codes.ctypes.data, 0, n, k, None)
    ggml.get_type_traits(kind).contents.to_float(codes.ctypes.data, weight.ctypes.data, n * k)
    copies = max(2, min(MOST_COPIES, -(-cold // codes.nbytes)))
    for way, memory in ways(ggml, device):
        holder = ggml.init(Parameters(1 << 20, None, True))
        weights = [ggml.new_tensor_2d(holder, kind, k, n) for _ in range(copies)]
        kept = ggml.backend_alloc_ctx_tensors_from_buft(holder, memory)
        probe = ggml.mul_mat(holder, weights[0], ggml.new_tensor_2d(holder, FLOAT32, k, 1))
        able = kept and ggml.backend_dev_supports_op(device, probe)
        for tensor in weights if able else []:
            ggml.backend_tensor_set(tensor, codes.ctypes.data, 0, codes.nbytes)
        for m in rows if able else []:
            x = generator.standard_normal((m, k), dtype=np.float32)
            context = ggml.init(Parameters(16 << 20, None, True))
            given = ggml.new_tensor_2d(context, FLOAT32, k, m)
            products = [ggml.mul_mat(context, tensor, given) for tensor in weights]
            graphs = [ggml.new_graph(context) for _ in products]
            for graph, product in zip(graphs, products, strict=True):
                ggml.build_forward_expand(graph, product)
            used = ggml.backend_alloc_ctx_tensors_from_buft(context, ggml.backend_cpu_buffer_type())
            ggml.backend_tensor_set(given, x.ctypes.data, 0, x.nbytes)
            times = []
            for call in range(CALLS if m < 256 else 4):
                begun = time.perf_counter()
                ggml.backend_graph_compute(backend, graphs[call % copies])
                times.append((time.perf_counter() - begun) * 1e6)
            y = np.empty((m, n), dtype=np.float32)
            ggml.backend_tensor_get(products[0], y.ctypes.data, 0, y.nbytes)
            wanted = x[:CHECKED].astype(np.float64) @ weight.T.astype(np.float64)
            error = float(np.linalg.norm(y[:CHECKED] - wanted) / np.linalg.norm(wanted))
            yield {
                "impl": f"llama.cpp{way}",
                "scheme": name,
                "N": n,
                "K": k,
                "M": m,
                "us": round(float(np.median(times)), 2),
                "error": float(f"{error:.3g}"),
                "bytes": codes.nbytes,
            }
            ggml.backend_buffer_free(used)
            ggml.free(context)
        if kept:
            ggml.backend_buffer_free(kept)
        ggml.free(holder)


def main(n: str, k: str, rows: str, threads: str, cold: str) -> None:
    """Measure all types."""
    ggml = Ggml()
    for name in TYPES:
        for row in measure(ggml, name, int(n), int(k), [int(m) for m in rows.split(",")], int(threads), int(cold)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
