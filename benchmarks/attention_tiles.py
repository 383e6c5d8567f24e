"""Time of decode attention on a GPU by how its work is cut, for choosing `attention_gpu.tile_of`.

    python benchmarks/attention_tiles.py [--shapes 1x4096,8x4096] [--caches fp8_e4m3,int8,int4] [--minutes 3]
        [--pages equal | --pages unequal] [--near] [--size 128]

Prints for each shape and cache the tiles from the fastest on, in microseconds; heads and timing are as in attention.py.
Kernels are compiled by several processes beforehand.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from attention import PAGE, in_pages, table_of, unequal
from compiling import compile_by, in_processes
from torch import Tensor

from qcompile.codegen.attention_spec import (
    AttentionKernelSpec,
    AttentionTile,
    Reach,
    attention_kernel_spec,
    lanes_objection,
)
from qcompile.evaluate.timing import copies, microseconds
from qcompile.kv_cache import AttentionSpec, KVSpec, parse_kv_cache, quantize
from qcompile.powers import power_above
from qcompile.runtime import attention_gpu, cache
from qcompile.runtime.gpu import target_of

HEADS, GROUP = 8, 4
DEVICE = torch.device("cuda")


def spec_of(given: str, size: int) -> AttentionSpec:
    scheme = parse_kv_cache(json.loads(given) if given.startswith("{") else given)
    assert scheme is not None
    half = KVSpec(scheme=scheme, head_dim=size)
    return AttentionSpec(key=half, value=half, scale=size**-0.5)


def neighbours(tile: AttentionTile) -> list[AttentionTile]:
    """A tile, and those that differ in stages, in split, or, with lanes, in how many warps a program has."""
    found = [tile, *(replace(tile, stages=stages) for stages in (1, 2, 3))]
    found += [replace(tile, split=split) for split in (tile.split // 2, 2 * tile.split) if split]
    if tile.lanes:
        warps = 12 - tile.warps  # 4 or 8
        split = max(1, tile.split * tile.warps // warps)
        found.append(replace(tile, context=16 * warps, split=split, warps=warps, ways=warps))
    return list(dict.fromkeys(found))


def tiles(batch: int, context: int, paged: bool, lanes: bool) -> list[AttentionTile]:
    """Those worth a measurement: two to sixteen programs a processor, or as many as there is work for."""
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    pairs, found = batch * HEADS, []
    for warps, stages, power in itertools.product((4, 8) if lanes else (), (1, 2, 3), range(9)):
        programs = pairs << power if batch == 1 or not paged else pairs + (HEADS << power)
        enough = processors <= 2 * programs and (programs <= 8 * processors or power == 0)
        if enough and 16 * warps << power <= context * (batch if paged else 1):
            cut = AttentionTile(context=16 * warps, split=1 << power, warps=warps, stages=stages, ways=warps)
            found.append(replace(cut, lanes=True))
    if paged and batch > 1:  # of whose sequences each takes one program more than its share
        return found + [
            AttentionTile(context=block, split=split, warps=warps, stages=stages, ways=ways)
            for block, (warps, ways), stages in itertools.product((64, 128), ((4, 1), (4, 4)), (3, 4, 5))
            for split in (16, 32, 64, 128, 256)
            if processors <= 2 * (pairs + HEADS * split) and split * block <= batch * context
        ]
    kinds = [
        *itertools.product((64,), ((4, 1), (4, 4), (2, 2)), (2, 3, 4, 5)),
        *itertools.product((128,), ((4, 1), (4, 4), (8, 8)), (2, 3)),
        *itertools.product((32,), ((2, 2),), (3, 4)),
    ]
    for block, (warps, ways), stages in kinds:
        for split in (1, 2, 4, 8, 16, 32, 64):
            programs = pairs * split
            if split * block <= context and processors <= 2 * programs and (programs <= 16 * processors or split == 1):
                found.append(AttentionTile(context=block, split=split, warps=warps, stages=stages, ways=ways))
    return found


def tensors_of(spec: AttentionSpec, batch: int, context: int) -> list[Tensor]:
    made: list[Tensor] = []
    for half in (spec.key, spec.value):
        scale = None if half.scheme.dynamic else torch.full((), 0.02, device=DEVICE)
        parts = [
            quantize(torch.randn(1, HEADS, context, half.head_dim, device=DEVICE), half.scheme, scale)
            for _ in range(min(batch, 2))
        ]
        codes = torch.cat([parts[i % len(parts)][0] for i in range(batch)])
        made += [codes, torch.cat([parts[i % len(parts)][1] for i in range(batch)]) if scale is None else scale]
    return made


def launches(kernel: AttentionKernelSpec, cold: list[list[Tensor]], lengths: list[int]) -> list[Callable[[], Tensor]]:
    """One launch for each copy of a cache; in pages if the kernel reads them, of as many tokens as `lengths` say."""
    function, table, ends = cache.load(kernel).kernel, None, None
    query = torch.randn(len(lengths), HEADS * GROUP, 1, kernel.key_size, device=DEVICE, dtype=torch.bfloat16)
    if kernel.reach.page:
        table, ends = table_of(lengths), torch.tensor(lengths, device=DEVICE)
    return [
        partial(attention_gpu.launch, kernel, function, query, tensors, None, ends, block_table=table)
        for tensors in cold
    ]


def compile_one(given: tuple[str, str]) -> str:
    """Compile a kernel in a process of its own, by a launch on one sequence."""
    encoded, name = given

    def launch(kernel: AttentionKernelSpec) -> None:
        tensors = tensors_of(spec_of(name, kernel.key_size), 1, 128)
        launches(kernel, [[in_pages(t) for t in tensors] if kernel.reach.page else tensors], [128])[0]()

    return compile_by(launch, encoded)


def main() -> None:
    """Time all tiles of all shapes, or as many as fit into the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1x4096,1x16384,1x65536,8x4096,64x4096")
    parser.add_argument("--caches", default="fp8_e4m3,int8,int4")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--keep", type=int, default=8, help="tiles that are printed")
    parser.add_argument("--pages", choices=["equal", "unequal"], default="", help="of paged caches")
    parser.add_argument("--size", type=int, default=128, help="of a key and a value")
    parser.add_argument("--near", action="store_true", help="the tile that is chosen, and its neighbours, alone")
    given = parser.parse_args()
    start, target = time.monotonic(), target_of(DEVICE)
    wanted = []
    for name, shape in itertools.product(
        given.caches.split(";" if "{" in given.caches else ","), given.shapes.split(",")
    ):
        batch, context = map(int, shape.split("x"))
        spec, reach = spec_of(name, given.size), Reach(length=False)
        if given.pages:
            sequences = power_above(batch) if batch > 1 else 0
            reach = Reach(length=True, sequences=sequences, page=PAGE)
        make = partial(attention_kernel_spec, spec, HEADS, GROUP, 1, "none", reach, torch.bfloat16, target)
        lanes = lanes_objection(spec, GROUP, reach.page, torch.bfloat16, target) is None
        lengths = unequal(batch, context) if given.pages == "unequal" else [context] * batch
        chosen = attention_gpu.choose(
            spec, batch, HEADS, GROUP, 1, max(lengths), "none", reach, torch.bfloat16, target
        ).tile
        cuts = neighbours(chosen) if given.near else tiles(batch, context, bool(given.pages), lanes)
        wanted.append((name, batch, context, spec, lengths, chosen, [make(tile) for tile in cuts]))
    notes = in_processes(compile_one, {kernel: name for name, *_, found in wanted for kernel in found})
    for name, batch, context, spec, lengths, chosen, found in wanted:
        if time.monotonic() - start > 60 * given.minutes:
            print("out of time before", name, batch, context)
            break
        tensors = tensors_of(spec, batch, context)
        cold = copies(DEVICE, *([in_pages(t) for t in tensors] if given.pages else tensors))
        times = {}
        for kernel in found:
            if not notes[kernel]:
                times[kernel.tile] = microseconds(launches(kernel, [list(t) for t in cold], lengths), DEVICE)
        del cold
        print(f"\n{name} {batch}x{context}, chosen now {chosen}: {times.get(chosen, float('nan')):.2f}")
        for tile in sorted(times, key=times.__getitem__)[: given.keep]:
            print(
                f"  {times[tile]:9.2f}  context {tile.context} ways {tile.ways} of {tile.warps} warps, "
                f"{tile.stages} stages, split {tile.split}{', lanes' if tile.lanes else ''}"
            )
        for warps, ways, lanes in sorted({(t.warps, t.ways, t.lanes) for t in times}):
            kind = (t for t in times if (t.warps, t.ways, t.lanes) == (warps, ways, lanes))
            best = min(kind, key=times.__getitem__)
            print(
                f"  best of {warps} warps, {ways} ways{', lanes' if lanes else ''}: {times[best]:.2f} "
                f"context {best.context}, {best.stages} stages, split {best.split}"
            )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
