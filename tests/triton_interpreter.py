"""Running kernels on CPU tensors with Triton's interpreter, faithfully: `interpret(kernel)[grid](...)`.

The interpreter computes bfloat16 on its raw bits (silently wrong), rounds float32 to bfloat16 and fp8 wrongly, reads
any address, and is chosen for a whole process when Triton is imported. `install` mends all of this once:

- bfloat16 and fp8 are decoded to float32, computed there, and rounded to nearest even (fp8 saturates);
- inline PTX of a few instructions is evaluated;
- a load, store or atomic outside the memory of every argument, and of `REACHED`, raises IndexError;
- the same kernel objects can be interpreted and compiled in one process, with TRITON_INTERPRET unset.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

_FP8 = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}
_COMPARE = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
Handle = interpreter.TensorHandle
REACHED: list[torch.Tensor] = []
"""Tensors that kernels reach by addresses which they read from others."""


def _is_raw(dtype: Any) -> bool:
    """Whether the interpreter holds a type as its bits."""
    return dtype.name == "bf16" or dtype.name in _FP8


def _decode(data: Any, dtype: Any) -> Any:
    if dtype.name == "bf16":
        return (np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype.name in _FP8:
        bits = torch.from_numpy(np.ascontiguousarray(data).view(np.uint8).copy())
        return bits.view(_FP8[dtype.name]).float().numpy()
    return data


def _encode(values: Any, dtype: Any) -> Any:
    values = torch.from_numpy(np.array(values, dtype=np.float32))
    if dtype.name == "bf16":
        return values.to(torch.bfloat16).view(torch.uint16).numpy()
    limit = torch.finfo(_FP8[dtype.name]).max
    return values.clamp(-limit, limit).to(_FP8[dtype.name]).view(torch.uint8).numpy()


def _as_float(handle: Any) -> Any:
    dtype = handle.dtype.scalar
    return Handle(_decode(handle.data, dtype), tl.float32) if _is_raw(dtype) else handle


def _install_arithmetic(builder: Any) -> None:
    binary, unary, ternary, cast = builder.binary_op, builder.unary_op, builder.ternary_op, builder.cast_impl

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        dtype = left.dtype.scalar
        if not _is_raw(dtype) or op in _BITWISE:
            return binary(self, left, right, op)
        result = op(_as_float(left).data, _as_float(right).data)
        return Handle(result, tl.int1) if op in _COMPARE else Handle(_encode(result, dtype), dtype)

    def unary_op(self: Any, x: Any, op: Any) -> Any:
        dtype = x.dtype.scalar
        return Handle(_encode(op(_as_float(x).data), dtype), dtype) if _is_raw(dtype) else unary(self, x, op)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        dtype = c.dtype.scalar
        if not _is_raw(dtype) or op is np.where:
            return ternary(self, a, b, c, op)
        return Handle(_encode(op(_as_float(a).data, _as_float(b).data, _as_float(c).data), dtype), dtype)

    def cast_impl(self: Any, source: Any, target_type: Any) -> Any:
        target = target_type.scalar
        if not _is_raw(source.dtype.scalar) and not _is_raw(target):
            return cast(self, source, target_type)
        values = _as_float(source).data
        if _is_raw(target):
            return Handle(_encode(values, target), target)
        return Handle(values.astype(interpreter._get_np_dtype(target)), target)

    def dot(self: Any, a: Any, b: Any, c: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        exact = np.float64 if c.data.dtype == np.int32 else np.float32
        product = _as_float(a).data.astype(exact) @ _as_float(b).data.astype(exact)
        return Handle((product + c.data.astype(exact)).astype(c.data.dtype), c.dtype.scalar)

    def fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        return Handle((a.data.astype(np.float64) * b.data + c.data).astype(np.float32), c.dtype.scalar)

    builder.create_fma = fma
    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.cast_impl, builder.create_dot = cast_impl, dot
    builder.create_fp_to_fp = lambda self, source, target, rounding: cast_impl(self, source, target)
    builder.get_bf16 = lambda self, value: Handle(_encode([value], tl.bfloat16), tl.bfloat16)


def _install_bounds(builder: Any) -> None:
    memory: list[tuple[int, int]] = []
    copy_arguments = interpreter.GridExecutor._init_args_hst

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        copied_args, copied_kwargs = copy_arguments(self, args, kwargs)
        memory.clear()
        for value in [*copied_args, *copied_kwargs.values(), *REACHED]:
            value = getattr(value, "base", value) if not isinstance(value, torch.Tensor) else value
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                memory.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        return copied_args, copied_kwargs

    def check(pointers: Any, mask: Any, what: str) -> None:
        addresses = pointers.data
        if mask is not None:
            addresses = addresses[np.broadcast_to(getattr(mask, "data", mask), addresses.shape).astype(bool)]
        addresses = np.asarray(addresses).reshape(-1).astype(np.uint64)
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        inside = np.zeros(addresses.shape, bool)
        for start, end in memory:
            inside |= (addresses >= np.uint64(start)) & (addresses + size <= np.uint64(end))
        if not inside.all():
            raise IndexError(f"{what}: {int((~inside).sum())} of {addresses.size} addresses are outside every argument")

    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(pointers, mask, "load")
        return load(self, pointers, mask, *rest, **named)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        check(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest, **named)

    def atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "atomic")
        return atomic(self, op, pointers, value, mask, *rest)

    interpreter.GridExecutor._init_args_hst = init_args
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw = atomic_rmw


def _funnel(low: Any, high: Any, count: Any) -> Any:
    """PTX shf.r.wrap: the low word of both, shifted right."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return (both >> (count & np.uint32(31)).astype(np.uint64)).astype(np.uint32)


def _permute_bytes(low: Any, high: Any, selector: Any) -> Any:
    """PTX prmt: each of four nibbles of the selector chooses one of eight bytes, or from 8 its sign."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(both, selector).shape, np.uint32)
    for byte in range(4):
        nibble = selector >> np.uint32(4 * byte) & np.uint32(15)
        chosen = both >> ((nibble & np.uint32(7)) * np.uint32(8)).astype(np.uint64) & np.uint64(255)
        chosen = np.where(nibble < 8, chosen, (chosen >> np.uint64(7)) * np.uint64(255))
        result |= chosen.astype(np.uint32) << np.uint32(8 * byte)
    return result


def _choose_bits(a: Any, b: Any, c: Any, table: Any) -> Any:
    """PTX lop3."""
    terms = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1]
    return np.bitwise_or.reduce(terms)


def _by_halves(function: Any, dtype: torch.dtype) -> Any:
    """Arithmetic of 16-bit floats in both halves of words: exact, then rounded to nearest even."""

    def apply(*words: Any) -> Any:
        words = np.broadcast_arrays(*words)
        values = [torch.from_numpy(np.ascontiguousarray(w).view(np.int16).copy()).view(dtype).double() for w in words]
        result = function(*values).to(dtype).view(torch.int16).numpy()
        return result.view(np.uint32).reshape(words[0].shape)

    return apply


def _floats(bits: Any, dtype: torch.dtype, wanted: torch.dtype) -> Any:
    """Bits of floats as those of another type."""
    values = torch.from_numpy(np.ascontiguousarray(bits).copy()).view(dtype).to(wanted)
    return values.view({2: torch.int16, 4: torch.int32}[wanted.itemsize]).numpy()


def _bfloat16(word: Any) -> Any:
    return _floats(word.view(np.int32), torch.float32, torch.bfloat16).view(np.uint16).astype(np.uint32)


def _float32(function: Any) -> Any:
    """Arithmetic of float32."""
    return lambda *words: function(*(np.ascontiguousarray(word).view(np.float32) for word in words)).view(np.uint32)


_PTX: dict[str, Any] = {
    "sub.rn.f32": _float32(np.subtract),
    "fma.rn.f32": _float32(lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32)),
    "mul.rn.f32": _float32(np.multiply),
    "mov.b32": lambda value: value,
    "mov.u32": lambda value: value,
    "setp.eq.u32": np.equal,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "xor.b32": np.bitwise_xor,
    "shl.b32": np.left_shift,
    "shr.b32": np.right_shift,
    "prmt.b32": _permute_bytes,
    "lop3.b32": _choose_bits,
    "shf.l.wrap.b32": lambda low, high, count: high << count | low >> np.uint32(32) - count,
    "shf.r.wrap.b32": lambda low, high, count: _funnel(low, high, count),
    "max.bf16x2": _by_halves(torch.fmax, torch.bfloat16),
    "cvt.rn.f16x2.e4m3x2": lambda pair: _floats(pair.view(np.uint8), torch.float8_e4m3fn, torch.float16).view(
        np.uint32
    ),
    "cvt.f32.f16": lambda half: _floats(half.view(np.int16), torch.float16, torch.float32).view(np.uint32),
    "cvt.rn.bf16x2.f32": lambda high, low: _bfloat16(high) << np.uint32(16) | _bfloat16(low),
}
for _name, _dtype in (("bf16x2", torch.bfloat16), ("f16x2", torch.float16)):
    _PTX[f"add.rn.{_name}"] = _by_halves(torch.add, _dtype)
    _PTX[f"mul.rn.{_name}"] = _by_halves(torch.mul, _dtype)
    _PTX[f"fma.rn.{_name}"] = _by_halves(lambda a, b, c: a * b + c, _dtype)


def _sparse_product(dtype: torch.dtype, registers: list[Any], selector: int) -> list[Any]:
    """mma.sp::ordered_metadata.m16n8k32 of each warp: PTX's fragments of 2:4 sparse A, of B, sums and metadata.

    Args:
        registers: four words of A, four of B, four sums and the word of metadata, each of all threads.
        selector: which two of four neighbours have the metadata.
    """
    words = [np.ascontiguousarray(r).reshape(-1, 8, 4) for r in registers]  # warp h l
    warps = words[0].shape[0]

    def halves(word: Any) -> Any:
        values = torch.from_numpy(np.ascontiguousarray(word).view(np.int16).copy()).view(dtype).double().numpy()
        return values.reshape(warps, 8, 4, 2)

    a, b, c = np.zeros((warps, 16, 32)), np.zeros((warps, 32, 8)), np.zeros((warps, 16, 8))
    warp, h = np.arange(warps)[:, None], np.arange(8)[None, :]
    for lane in range(4):
        for t, r in np.ndindex(2, 2):
            field = words[12][:, :, 2 * selector + t] >> np.uint32(16 * r + 4 * lane)
            places = [(field >> np.uint32(2 * i) & np.uint32(3)).astype(int) for i in range(2)]
            assert (places[0] < places[1]).all(), "metadata is not ordered"
            for i in range(2):
                a[warp, h + 8 * r, 16 * t + 4 * lane + places[i]] = halves(words[2 * t + r])[:, :, lane, i]
        for i, half in np.ndindex(4, 2):
            b[:, 8 * i + 2 * lane + half, :] = halves(words[4 + i])[:, :, lane, half]
        for r, half in np.ndindex(2, 2):
            c[:, 8 * r : 8 * r + 8, 2 * lane + half] = words[8 + 2 * r + half].view(np.float32)[:, :, lane]
    c = (c + a @ b).astype(np.float32)
    sums = [c[:, 8 * r : 8 * r + 8, half::2] for r, half in np.ndindex(2, 2)]
    return [np.ascontiguousarray(s).view(np.uint32).reshape(registers[0].shape) for s in sums]


_SPARSE_PRODUCTS = {
    f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{name}.{name}.f32": dtype
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16))
}

_KINDS = {"e4m3x2": torch.float8_e4m3fn, "e5m2x2": torch.float8_e5m2}


def _to_halves(kind: str) -> Any:
    """PTX cvt of two bytes of FP8 to two of float16."""

    def convert(pairs: Any) -> Any:
        values = torch.from_numpy(np.ascontiguousarray(pairs, dtype=np.uint16).view(np.uint8).copy()).view(_KINDS[kind])
        return values.half().numpy().view(np.uint32).reshape(np.shape(pairs))

    return convert


def _logarithm(value: Any) -> Any:
    """PTX lg2.approx.ftz, without its error."""
    value = np.ascontiguousarray(value).view(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log2(np.where(np.abs(value) < 2.0**-126, np.float32(0), value)).astype(np.float32).view(np.uint32)


def _pack_halves(high: Any, low: Any) -> Any:
    """PTX cvt of two numbers of float32 to float16."""
    both = np.stack([np.ascontiguousarray(x).view(np.float32) for x in (low, high)], -1)
    with np.errstate(over="ignore"):
        return both.astype(np.float16).view(np.uint32)[..., 0]


def _of_lanes(value: Any, lane: Any) -> Any:
    """PTX shfl.sync of all 32 threads: what those of each warp that `lane` names have."""
    return np.take_along_axis(value.reshape(-1, 32), np.broadcast_to(lane, value.shape).reshape(-1, 32), 1).reshape(-1)


def _turned(words: Any) -> Any:
    """PTX movmatrix of 8 x 8 halves of each warp."""
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, 8, 8)
    return np.ascontiguousarray(halves.transpose(0, 2, 1)).view(np.uint32).reshape(words.shape)


def _product(dtype: torch.dtype, registers: list[Any]) -> list[Any]:
    """mma.m16n8k16 of each warp: four words of two numbers of the first operand, two of the second, four sums."""

    def fragment(word: Any, kind: torch.dtype) -> Any:  # warps, g, what a row's threads have together
        values = torch.from_numpy(np.ascontiguousarray(word).view(np.int32).copy()).view(kind)
        return values.reshape(word.size // 32, 8, -1).double().numpy()

    a = [fragment(word, dtype) for word in registers[:4]]
    first = np.concatenate([np.concatenate(a[::2], 2), np.concatenate(a[1::2], 2)], 1)
    second = np.concatenate([fragment(word, dtype) for word in registers[4:6]], 2)
    c = np.stack([fragment(word, torch.float32) for word in registers[6:]], -1)  # warps, g, c, four sums
    sums = np.concatenate([c[..., :2], c[..., 2:]], 1).reshape(-1, 16, 8)
    sums = (sums + first @ second.transpose(0, 2, 1)).astype(np.float32).reshape(-1, 2, 8, 4, 2)
    parts = [sums[:, r, :, :, e] for r in range(2) for e in range(2)]
    return [np.ascontiguousarray(part).view(np.uint32).reshape(registers[0].shape) for part in parts]


_PRODUCTS = {
    f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32": dtype
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16))
}
_PTX |= {f"cvt.rn.f16x2.{kind}": _to_halves(kind) for kind in _KINDS} | {
    "cvt.rn.f16x2.f32": _pack_halves,
    "lg2.approx.ftz.f32": _logarithm,
    "movmatrix.sync.aligned.m8n8.trans.b16": _turned,
    "shfl.sync.bfly.b32": lambda value, distance, *_: _of_lanes(value, np.arange(value.size) % 32 ^ int(distance)),
    "shfl.sync.idx.b32": lambda value, lane, *_: _of_lanes(value, lane.astype(np.int64)),
}

_NO_EFFECT = ("griddepcontrol.", "cp.async.bulk.prefetch.", "bar.warp.sync ", "//")
"""Instructions that change when things happen, not what; only these may have a predicate."""


class _Results(list[Any]):
    def get_result(self, index: int) -> Any:
        return self[index]


def install_assembly(builder: Any) -> None:
    """Inline PTX of 32-bit registers and the instructions in `_PTX`, without branches; results may be 16-bit halves.

    Elements may be packed: then registers hold bytes or halves, and the one result 16-bit halves, of as many elements.
    """

    def create_inline_asm(
        self: Any, text: str, constraints: str, operands: Any, types: Any, is_pure: bool, pack: int
    ) -> _Results:
        assert pack == 1 or (pack in (2, 4) and len(types) == 1)
        registers: dict[str, Any] = {"%tid.x": np.uint32(0), "%lanemask_lt": np.uint32(0)}  # the first thread's
        outputs = constraints.count("=")
        for i, operand in enumerate(operands):
            data = np.ascontiguousarray(operand.data)
            data = data.reshape(-1) if pack > 1 else data
            registers[f"${outputs + i}"] = data.view(np.uint32) if data.dtype.itemsize * pack == 4 else data
        shape = operands[0].data.shape if operands else (1,)
        body = text.strip()
        for line in (body[1:-1] if body.startswith("{") else body).split(";"):
            line = line.strip()
            if not line or re.sub(r"^@\w+ ", "", line).startswith((".reg", *_NO_EFFECT)):
                continue
            name, rest = line.split(" ", 1)
            if name in _SPARSE_PRODUCTS:
                *names, selector = re.findall(r"\$\d+|0x\d", rest)
                given = [registers[n] for n in names[4:]]
                sums = _sparse_product(_SPARSE_PRODUCTS[name], given, int(selector, 0))
                registers |= zip(names[:4], sums, strict=True)
                continue
            if name in _PRODUCTS:
                names = re.findall(r"[$\w]+", rest)
                sums = _product(_PRODUCTS[name], [registers[n] for n in names[4:]])
                registers |= zip(names[:4], sums, strict=True)
                continue
            if rest.startswith("{"):
                target, source = rest[1:].split("}, ")
                for half, register in enumerate(target.split(", ")):
                    registers[register] = (registers[source] >> np.uint32(16 * half)).astype(np.uint16)
                continue
            if rest.endswith("}"):
                target, halves = rest[:-1].split(", {")
                low, high = (registers[half].astype(np.uint32) for half in halves.split(", "))
                registers[target] = low | high << np.uint32(16)
                continue
            target, *sources = rest.split(", ")
            values = [registers[s] if s in registers else np.uint32(int(s, 0)) for s in sources]
            registers[target] = _PTX[name](*values)
        results = _Results()
        if pack > 1:
            halves = np.stack([registers[f"${i}"] for i in range(outputs)], -1)
            scalar = types[0].scalar
            data = np.ascontiguousarray(halves).view(interpreter._get_np_dtype(scalar)).reshape(shape)
            results.append(Handle(data, scalar))
            return results
        for i, kind in enumerate(types):
            raw = np.broadcast_to(registers.get(f"${i}", np.uint32(0)), shape)
            scalar = getattr(kind, "scalar", kind)
            results.append(Handle(np.ascontiguousarray(raw).view(interpreter._get_np_dtype(scalar)), scalar))
        return results

    builder.create_inline_asm = create_inline_asm


class _Scope:
    """A patched `triton.language`, restored by the launch that patched it and by no call inside."""

    active = False

    def __init__(self, scope: Any) -> None:
        self.scope = scope

    def restore(self) -> None:
        if self.scope is not None:
            self.scope.restore()
            _Scope.active = False


class _Globals:
    __globals__: ClassVar[dict[str, Any]] = {"tl": tl, "core": tl.core}


def _install_dual() -> None:
    patch = interpreter._patch_lang

    def patch_once(function: Any) -> _Scope:
        if _Scope.active:
            return _Scope(None)
        _Scope.active = True
        return _Scope(patch(_Globals))

    def call_interpreted(self: Any, *args: Any, **kwargs: Any) -> Any:
        scope = interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    functions: dict[Any, Any] = {}

    def call_jit(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in functions:
            functions[self.fn] = interpreter.InterpretedFunction(self.fn)
        return functions[self.fn](*args, **kwargs)

    interpreter._patch_lang = patch_once
    interpreter.InterpretedFunction.__call__ = call_interpreted
    JITFunction.__call__ = call_jit


_installed = False


def install() -> None:
    """Mend the interpreter; once a process."""
    global _installed
    if not _installed:
        _installed = True
        _install_arithmetic(interpreter.InterpreterBuilder)
        _install_bounds(interpreter.InterpreterBuilder)
        install_assembly(interpreter.InterpreterBuilder)
        _install_dual()


def interpret(kernel: JITFunction) -> Any:
    """The kernel as something to launch over a grid, which takes CPU tensors."""
    install()
    return interpreter.InterpretedFunction(kernel.fn)
