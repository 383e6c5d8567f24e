"""Time of prompts' attention on a GPU by how its work is cut, for choosing `attention_gpu.prefill_tile_of`.

    python benchmarks/attention_prefill_tiles.py [--sizes 128,256] [--caches fp8_e4m3,int8,bfloat16]
        [--shapes 1x2048x2048,1x64x16384]

Prints for each shape (sequences, queries, context), size of heads and cache the tiles from the fastest on, in
microseconds; heads and timing are as in attention.py. Kernels are compiled by several processes beforehand.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial

import torch
from compiling import compile_by, in_processes
from torch import Tensor

from qcompile.codegen.attention_spec import AttentionKernelSpec, AttentionTile, Reach, attention_kernel_spec
from qcompile.evaluate.timing import microseconds
from qcompile.kv_cache import AttentionSpec, KVSpec, parse_kv_cache, quantize
from qcompile.runtime import attention_gpu, cache
from qcompile.runtime.gpu import target_of

HEADS, GROUP = 8, 4
DEVICE = torch.device("cuda")
TILES = ((32, 128, 8), (64, 128, 8), (32, 64, 4), (64, 64, 4), (64, 64, 8), (32, 32, 4))
"""Tokens, rows and warps."""


def spec_of(kv: str, size: int) -> AttentionSpec:
    scheme = parse_kv_cache(kv, torch.bfloat16)
    assert scheme is not None
    half = KVSpec(scheme=scheme, head_dim=size)
    return AttentionSpec(key=half, value=half, scale=size**-0.5, causal=True)


def kernels_of(spec: AttentionSpec, batch: int, queries: int, context: int, target: str) -> list[AttentionKernelSpec]:
    """The chosen kernel, then those of other tiles."""
    options = (HEADS, GROUP, 0, "none", Reach(length=False), torch.bfloat16, target)
    chosen = attention_gpu.choose_prefill(spec, batch, HEADS, GROUP, queries, context, *options[3:])
    found = [chosen]
    for (block, rows, warps), stages in itertools.product(TILES, (2, 3)):
        tile = AttentionTile(context=block, split=1, warps=warps, stages=stages, rows=rows)
        tile = attention_gpu.shared_by(tile, batch * HEADS * -(-queries * GROUP // rows), context, target)
        found.append(attention_kernel_spec(spec, *options, tile))
    return list(dict.fromkeys(found))


def tensors_of(spec: AttentionSpec, batch: int, queries: int, context: int) -> tuple[Tensor, list[Tensor]]:
    """Queries, and a cache."""
    size, made = spec.key.head_dim, []
    for half in (spec.key, spec.value):
        scale = None if half.scheme.dynamic else torch.full((), 0.02, device=DEVICE)
        made += quantize(torch.randn(batch, HEADS, context, size, device=DEVICE), half.scheme, scale)
    return torch.randn(batch, HEADS * GROUP, queries, size, device=DEVICE, dtype=torch.bfloat16), made


def run(kernel: AttentionKernelSpec, query: Tensor, tensors: list[Tensor]) -> Tensor:
    return attention_gpu.launch(kernel, cache.load(kernel).kernel, query, tensors, None, None)


def compile_one(given: tuple[str, tuple[str, int]]) -> str:
    """Compile a kernel in a process of its own, by a launch on one short prompt."""
    encoded, cache_and_size = given
    return compile_by(lambda kernel: run(kernel, *tensors_of(spec_of(*cache_and_size), 1, 16, 128)), encoded)


def main() -> None:
    """Time all tiles of all shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="128,256")
    parser.add_argument("--caches", default="fp8_e4m3,int8,bfloat16")
    parser.add_argument("--shapes", default="1x2048x2048,1x64x16384")
    given = parser.parse_args()
    target = target_of(DEVICE)
    wanted = [
        (kv, int(size), *map(int, shape.split("x")))
        for size, kv, shape in itertools.product(
            given.sizes.split(","), given.caches.split(","), given.shapes.split(",")
        )
    ]
    kernels: dict[AttentionKernelSpec, tuple[str, int]] = {}
    for kv, size, *shape in wanted:
        kernels |= dict.fromkeys(kernels_of(spec_of(kv, size), *shape, target), (kv, size))
    notes = in_processes(compile_one, kernels)
    for kv, size, *shape in wanted:
        spec = spec_of(kv, size)
        query, tensors = tensors_of(spec, *shape)
        found = kernels_of(spec, *shape, target)
        times = {
            kernel.tile: microseconds([partial(run, kernel, query, tensors)] * 4, DEVICE)
            for kernel in found
            if not notes[kernel]
        }
        print(f"\n{kv}, heads of {size}, {'x'.join(map(str, shape))}; chosen now {found[0].tile}")
        for tile in sorted(times, key=times.__getitem__):
            print(
                f"  {times[tile]:9.2f}  context {tile.context}, {tile.rows} rows, {tile.warps} warps, "
                f"{tile.stages} stages, split {tile.split}"
            )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
