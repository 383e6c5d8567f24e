"""Which kernel multiplies by a weight: a tile of our template, or one of torch's own products.

The choice is looked up by the family of the GPU, the family of the linear (all that decides its kernel but the shape,
the epilogue and the tile) and the bucket of M. The first that there is, is taken:

1. this shape in the user's table, `<cache_dir>/tuned`, where timing was asked for (`measure`);
2. this shape in the table shipped for the GPU, `codegen/tuned/<gpu>.json`;
3. the nearest shape of the same family and bucket in either table, where its choice is legal here. The distance of
   shapes is |log2 N / N'| + |log2 K / K'|, at most `REACH`;
4. what the cost model predicts to be fastest.

Nothing that is read from a file is trusted: a choice must be one of those that the cost model would propose for this
shape. Nothing is timed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import re
import uuid
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import torch

from qcompile.codegen.cost_model import candidates, rank
from qcompile.codegen.predict import predict
from qcompile.codegen.spec import GroupedSpec, KernelSpec, Tile, grouped_spec, kernel_spec
from qcompile.fingerprint import fingerprint
from qcompile.flags import flags
from qcompile.linear_spec import LinearSpec, generation
from qcompile.runtime import cache, vendor, vendor_grouped

Choice: TypeAlias = Tile | str
"""A tile of our template, or the name of a path of `vendor.PATHS` or, of stacks, `vendor_grouped.PATHS`."""

Key: TypeAlias = tuple[int, int, int]
"""N, K and the bucket of M."""

REACH = 2.0
"""Greatest distance of a shape from which a choice is taken over: a factor of four in all."""

MANY = 128
"""Rows from which one of torch's products is taken that was not timed: before, the time is that of reading weights."""

SHIPPED, TUNED, PREDICTED = "shipped table", "tuned", "cost model"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a table says of a shape and bucket: a choice as JSON holds it, and the microseconds it took."""

    choice: Any
    us: float


Table: TypeAlias = dict[str, dict[Key, Record]]
"""Records by family."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What runs a linear.

    Attributes:
        kernel: of our template; where `vendor` takes its place, the best that the cost model knows.
        vendor: a name of `vendor.PATHS` or, of a stack of experts, `vendor_grouped.PATHS`, or None.
        origin: where the choice comes from, for reports.
        us: microseconds that this choice was measured to take for this shape and bucket, or None.
    """

    kernel: KernelSpec
    vendor: str | None
    origin: str
    us: float | None = None

    @property
    def name(self) -> str:
        """The template or the path."""
        return self.vendor or self.kernel.source


def gpu_family(name: str) -> str:
    """Vendor and model of a device's name: `nvidia-h100` for "NVIDIA H100 80GB HBM3"."""
    model = re.split(r"\b\d+GB\b", name)[0]
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")


_ALIKE = {"bfloat16": "16-bit", "float16": "16-bit"}


def family(kernel: KernelSpec) -> str:
    """All that decides a kernel but shape, epilogue and tile, as one readable line.

    bfloat16 and float16 are one family, and blocks as long or as high as the weight are called so.
    """
    plain = {f.name: getattr(kernel, f.name) for f in dataclasses.fields(kernel)}
    for name in ("n", "k", "epilogue", "tile"):
        del plain[name]
    sizes = {"rows": kernel.n, "columns": kernel.k, "super_columns": kernel.k}
    plain |= {name: "all" for name, size in sizes.items() if 1 < plain[name] == size or plain[name] > size}
    plain |= {name: _ALIKE.get(plain[name], plain[name]) for name in ("x_dtype", "out_dtype")}
    return " ".join(f"{name}={value}" for name, value in plain.items() if value not in (None, "", False, 0))


def options(like: KernelSpec, m: int) -> list[Choice]:
    """Every choice that is legal for a linear and a bucket of M, the one that is predicted fastest first."""
    kernels = candidates(like, m)
    choices: list[tuple[float, Choice]] = [(predict(k, m), k.tile) for k in rank(kernels, m, keep=len(kernels))]
    choices += [(predict(like, m, name), name) for name in vendors(like, m)]
    return [choice for _, choice in sorted(choices, key=lambda pair: pair[0])]


def vendors(like: KernelSpec, m: int) -> list[str]:
    """Torch's products that are legal for a linear, or a stack of experts, and a bucket of M."""
    if isinstance(like, GroupedSpec):
        return [name for name in vendor_grouped.PATHS if vendor_grouped.objection(name, like) is None]
    return [name for name in vendor.PATHS if vendor.objection(name, like, m) is None]


def predicted(like: KernelSpec, m: int) -> Choice:
    """The legal choice that is predicted fastest; one of torch's only for `MANY` rows or more."""
    return next(choice for choice in options(like, m) if m >= MANY or isinstance(choice, Tile))


def plain(choice: Choice) -> Any:
    """A choice as JSON holds it."""
    return choice if isinstance(choice, str) else dataclasses.asdict(choice)


def show(choice: Choice) -> str:
    """A choice in few words."""
    if isinstance(choice, str):
        return choice
    return " ".join(f"{name}={value}" for name, value in vars(choice).items())


def resolve(given: Any, like: KernelSpec, m: int) -> Choice | None:
    """The legal choice that a table's entry stands for; None if there is no such."""
    return next((choice for choice in options(like, m) if plain(choice) == given), None)


def to_json(name: str, key: Key, found: Record) -> dict[str, Any]:
    """A table's entry as files hold it."""
    n, k, m = key
    return {"family": name, "n": n, "k": k, "m": m, "choice": found.choice, "us": found.us}


def from_json(entry: Any) -> tuple[str, Key, Record]:
    """The inverse of `to_json`.

    Raises:
        ValueError, KeyError, TypeError: something that is no entry.
    """
    key = int(entry["n"]), int(entry["k"]), int(entry["m"])
    if min(key) < 1:
        raise ValueError(f"not a shape: {key}")
    return str(entry["family"]), key, Record(choice=entry["choice"], us=float(entry["us"]))


def parse_table(text: str) -> Table:
    """The entries of a table's JSON, {"entries": [...]}, without those that are damaged."""
    found: Table = {}
    try:
        entries = list(json.loads(text)["entries"])
    except (ValueError, KeyError, TypeError):
        return found
    for entry in entries:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            name, key, content = from_json(entry)
            found.setdefault(name, {})[key] = content
    return found


def print_table(table: Table, **header: Any) -> str:
    """The inverse of `parse_table`, an entry a line, with more keys at the top."""
    entries = [to_json(name, *item) for name, records in sorted(table.items()) for item in sorted(records.items())]
    head = json.dumps({**header, "entries": None})[: -len("null}")]
    return head + "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]}\n"


@functools.cache
def shipped(gpu: str) -> Table:
    """The table that the package has for a family of GPUs; empty if it has none."""
    file = resources.files("qcompile.codegen").joinpath("tuned").joinpath(f"{gpu}.json")
    return parse_table(file.read_text(encoding="utf-8")) if gpu and file.is_file() else {}


def _stamp() -> str:
    """What measured times depend on beside the GPU."""
    return f"qcompile {fingerprint()} torch {torch.__version__} triton {_version('triton')}"


@functools.cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _folder(gpu: str, name: str) -> Path:
    return flags.cache_dir / "tuned" / gpu / cache.digest(name)


def recorded(gpu: str, name: str) -> dict[Key, Record]:
    """The user's table of a family of linears; damaged files and those of other versions are passed over."""
    found = {}
    for path in sorted(_folder(gpu, name).glob("*.json")):
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            stored, key, content = from_json(entry)
            if stored == name and entry["made_by"] == _stamp():
                found[key] = content
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def record(gpu: str, like: KernelSpec, m: int, choice: Choice, us: float) -> Path:
    """Put what was measured into the user's table: a file for each shape and bucket, so that no process waits.

    Raises:
        OSError: the folder cannot be written to.
    """
    name = family(like)
    entry = to_json(name, (like.n, like.k, m), Record(choice=plain(choice), us=us)) | {"made_by": _stamp()}
    path = _folder(gpu, name) / f"{like.n}x{like.k}x{m}.json"
    cache.write_file(path, json.dumps(entry, indent=1) + "\n")
    cache.write_file(flags.cache_dir / "tuned" / "generation", uuid.uuid4().hex)
    choose.cache_clear()
    generation.cache_clear()
    return path


def _distance(key: Key, like: KernelSpec) -> float:
    return abs(math.log2(key[0] / like.n)) + abs(math.log2(key[1] / like.k))


def _look_up(like: KernelSpec, m: int, gpu: str) -> tuple[Choice, str, float | None] | None:
    """A choice from the tables, where it comes from, and its microseconds if they are of this very shape."""
    name = family(like)
    tables = {TUNED: recorded(gpu, name), SHIPPED: shipped(gpu).get(name, {})}
    near = [
        (_distance(key, like), position, key, origin)
        for position, (origin, records) in enumerate(tables.items())
        for key in records
        if key[2] == m and min(key) > 0
    ]
    for distance, _, key, origin in sorted(near):
        if distance > REACH:
            break
        found = tables[origin][key]
        choice = resolve(found.choice, like, m)
        if choice is not None:
            exact = distance == 0
            return choice, origin if exact else f"{origin}, {key[0]} x {key[1]}", found.us if exact else None
    return None


def any_kernel(
    spec: LinearSpec, x_dtype: torch.dtype, out_dtype: torch.dtype, target: str, experts: int = 0
) -> KernelSpec:
    """A linear's kernel with the smallest tile.

    Args:
        x_dtype: of the activations as the kernel receives them: 8-bit if the scheme quantizes them.
        experts: of a stack, in which `spec` is one of them; 0 for a linear that is alone.
    """
    kernel = kernel_spec(spec, x_dtype, out_dtype, target, Tile(m=16, n=64, k=64, split=1, warps=4, stages=3))
    return grouped_spec(kernel, experts) if experts else kernel


@functools.lru_cache(maxsize=4096)
def choose(
    spec: LinearSpec,
    m: int,
    x_dtype: torch.dtype,
    out_dtype: torch.dtype,
    target: str,
    gpu: str = "",
    experts: int = 0,
) -> Chosen:
    """What runs a linear for M up to `m`, a `gpu.bucket`, or a stack of experts with as many rows each.

    Args:
        x_dtype, target, experts: see `any_kernel`.
        gpu: `gpu_family` of the device; "" looks into no table.
    """
    like = any_kernel(spec, x_dtype, out_dtype, target, experts)
    found = _look_up(like, m, gpu) if gpu else None
    choice, origin, us = found or (predicted(like, m), PREDICTED, None)
    return chosen(choice, like, m, origin, us)


def chosen(choice: Choice, like: KernelSpec, m: int, origin: str, us: float | None = None) -> Chosen:
    """A choice for a linear and a bucket of M as what runs it."""
    if isinstance(choice, Tile):
        return Chosen(kernel=replace(like, tile=choice), vendor=None, origin=origin, us=us)
    return Chosen(kernel=ours(like, m), vendor=choice, origin=origin, us=us)


def ours(like: KernelSpec, m: int) -> KernelSpec:
    """The kernel of our template that the cost model finds fastest."""
    return rank(candidates(like, m), m, keep=1)[0]


def is_tuned(like: KernelSpec, m: int, gpu: str) -> bool:
    """Whether the user's table has a legal choice for this very shape and bucket."""
    found = recorded(gpu, family(like)).get((like.n, like.k, m))
    return found is not None and resolve(found.choice, like, m) is not None
