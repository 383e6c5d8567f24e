"""The container of GGUF: sound files are read as the gguf package reads them, others are refused quickly by name."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc

import pytest

gguf = pytest.importorskip("gguf")

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompile.checkpoint.gguf_file import open_gguf
from qcompile.errors import CheckpointError
from tests.checkpoint.gguf_files import Q, random_blocks, write

METADATA = {
    "tokenizer.ggml.pre": "smollm",
    "llama.block_count": 1,
    "llama.rope.freq_base": 1e4,
    "some.flag": True,
    "some.numbers": [1, 2, 3],
    "some.words": ["a", "bc", "déf"],
}
TENSORS = {
    "floats.weight": np.arange(96, dtype=np.float32).reshape(3, 32),
    "half.weight": np.arange(10, dtype=np.float16),
    "blocks.weight": (random_blocks(Q.Q4_1, (3, 64)), Q.Q4_1),
    "experts.weight": (random_blocks(Q.Q8_0, (2, 3, 32)), Q.Q8_0),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "sound.gguf", "llama", METADATA, TENSORS)


def test_as_the_gguf_package_reads_it(sound):
    file = open_gguf(sound)
    expected = gguf.GGUFReader(sound)
    assert list(file.tensors) == [t.name for t in expected.tensors]
    for theirs in expected.tensors:
        ours = file.tensors[theirs.name]
        assert ours.kind == theirs.tensor_type
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert ours.offset == theirs.data_offset
        rows = int(np.prod(ours.shape[:-1]))
        assert ours.rows(0, rows).numpy().tobytes() == theirs.data.tobytes()
        assert ours.rows(rows - 1, rows).numpy().tobytes() == theirs.data.tobytes()[-ours.row_bytes :]
    assert file.metadata["general.architecture"] == "llama"
    assert {k: file.metadata[k] for k in METADATA if k != "some.words"} == {
        k: v for k, v in METADATA.items() if k != "some.words"
    }
    assert file.metadata["some.words"] is None


def test_alignment(tmp_path):
    path = write(tmp_path / "wide.gguf", "llama", {}, TENSORS, alignment=256)
    assert all(t.offset % 256 == 0 for t in open_gguf(path).tensors.values())
    assert [t.offset for t in open_gguf(path).tensors.values()] == [
        t.data_offset for t in gguf.GGUFReader(path).tensors
    ]


def test_truncated_anywhere(sound, tmp_path):
    content = sound.read_bytes()
    needed = max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(sound).tensors)
    path = tmp_path / "short.gguf"
    for keep in [*range(4, 1000, 7), *range(1000, needed, 101), needed - 1]:
        path.write_bytes(content[:keep])
        with pytest.raises(CheckpointError, match="truncated") as error:
            open_gguf(path)
        assert str(path) in str(error.value)


def test_cut_short_after_it_was_opened(sound, tmp_path):
    path = tmp_path / "file.gguf"
    path.write_bytes(sound.read_bytes())
    tensor = open_gguf(path).tensors["experts.weight"]
    os.truncate(path, tensor.offset + 10)
    with pytest.raises(CheckpointError, match=r"experts\.weight is cut short"):
        tensor.rows(0, 1)


@pytest.mark.parametrize("content", [b"", b"GG", b"\x80\x02pickle", b"{'json': 1}"])
def test_wrong_magic(tmp_path, content):
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        open_gguf(path)


@pytest.mark.parametrize(("version", "message"), [(9, "version 9"), (1, "version 1"), (3 << 24, "big-endian")])
def test_other_versions(sound, tmp_path, version, message):
    path = tmp_path / "new.gguf"
    content = bytearray(sound.read_bytes())
    content[4:8] = struct.pack("<I", version)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_gguf(path)


def test_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="not a file"):
        open_gguf(tmp_path)
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match="not a file"):
        open_gguf(tmp_path / "pipe.gguf")


# Directories written by hand, to lie in.


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def info(name: bytes = b"w", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    """`shape` as the file lists it, innermost first."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def directory(*infos: bytes, values: tuple[bytes, ...] = (), tensors: int | None = None, data: int = 4096) -> bytes:
    count = len(infos) if tensors is None else tensors
    head = b"GGUF" + struct.pack("<IQQ", 3, count, len(values)) + b"".join(values) + b"".join(infos)
    return head + bytes(-len(head) % 32 + data)


def value(key: bytes, kind: int, content: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + content


HOSTILE = {
    "many tensors": (directory(tensors=2**60), "states 1152921504606846976 tensors"),
    "more tensors than bytes": (directory(tensors=2**17), "damaged|truncated"),
    "many values": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "metadata values"),
    "long key": (directory(values=(struct.pack("<Q", 2**40),)), "length of 1099511627776"),
    "longer than the file": (directory(values=(struct.pack("<Q", 2**20),)), "truncated"),
    "key of no text": (directory(values=(value(b"\xff\xfe", 4, bytes(4)),)), "not UTF-8"),
    "empty key": (directory(values=(value(b"", 4, bytes(4)),)), "damaged"),
    "two values of a key": (directory(values=(value(b"a", 4, bytes(4)),) * 2), "names a twice"),
    "unknown value type": (directory(values=(value(b"a", 77, bytes(4)),)), "unknown value type 77"),
    "huge array": (directory(values=(value(b"a", 9, struct.pack("<IQ", 4, 2**62)),)), "a states 4611686018427387904"),
    "array longer than the file": (directory(values=(value(b"a", 9, struct.pack("<IQ", 12, 2**20)),)), "truncated"),
    "array of arrays": (directory(values=(value(b"a", 9, struct.pack("<IQ", 9, 1)),)), "array of value type 9"),
    "long word of an array": (
        directory(values=(value(b"a", 9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", 2**64 - 1)),)),
        "truncated",
    ),
    "alignment 0": (directory(values=(value(b"general.alignment", 4, bytes(4)),)), "alignment is 0"),
    "alignment 48": (directory(values=(value(b"general.alignment", 4, struct.pack("<I", 48)),)), "alignment is 48"),
    "alignment beyond the file": (
        directory(info(), values=(value(b"general.alignment", 4, struct.pack("<I", 2**31)),)),
        "truncated",
    ),
    "two tensors of a name": (directory(info(), info(offset=128)), "two tensors are named w"),
    "no dimensions": (directory(info(shape=())), "w has 0 dimensions"),
    "five dimensions": (directory(info(shape=(1,) * 5)), "w has 5 dimensions"),
    "a dimension of 0": (directory(info(shape=(32, 0))), "w is empty"),
    "dimensions whose product overflows": (directory(info(shape=(2**32, 2**32, 2))), r"within w \("),
    "a dimension that is negative when signed": (directory(info(shape=(2**64 - 1,))), r"within w \("),
    "rows of no whole blocks": (directory(info(shape=(33, 2), kind=8)), "w: rows of 33 weights cannot be Q8_0"),
    "an offset out of line": (directory(info(offset=8)), "no multiple of the alignment"),
    "an offset beyond the file": (directory(info(offset=2**40)), r"within w \("),
    "an offset that overflows": (directory(info(offset=2**64 - 32)), r"within w \("),
    "overlap": (directory(info(b"v", offset=0), info(b"w", offset=96)), "w overlaps"),
    "overlap, listed backwards": (directory(info(b"v", offset=96), info(b"w", offset=0)), "v overlaps"),
    "IQ2_XS": (directory(info(kind=17, shape=(256,))), "w is of type IQ2_XS.*llama-quantize"),
    "NVFP4": (directory(info(kind=40, shape=(64,))), "w is of type NVFP4"),
    "unknown type": (directory(info(kind=4000)), "w is of type number 4000"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_gguf(path)
    assert str(path) in str(error.value)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated(sound, tmp_path, data):
    """A mutated file opens as the gguf package opens it, or is refused: in little time and memory either way."""
    content = bytearray(sound.read_bytes())
    directory_end = min(t.data_offset for t in gguf.GGUFReader(sound).tensors)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, directory_end - 1))
        patch = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=4),
                st.sampled_from([struct.pack("<Q", v) for v in (0, 1, 2**31, 2**32, 2**63, 2**64 - 1, len(content))]),
            )
        )
        content[at : at + len(patch)] = patch
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)

    tracemalloc.start()
    began = time.perf_counter()
    try:
        file = open_gguf(path)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
        file = None
    assert time.perf_counter() - began < 5
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    if file is None:
        return
    for tensor in file.tensors.values():
        rows = int(np.prod(tensor.shape[:-1]))
        assert tensor.rows(0, rows).numel() == rows * tensor.row_bytes
    try:
        theirs = gguf.GGUFReader(path)
    except ValueError:  # it is stricter about some metadata's types
        return
    assert {t.name: t.data_offset for t in theirs.tensors} == {t.name: t.offset for t in file.tensors.values()}


# Split models.


@pytest.fixture
def parts(tmp_path):
    write(tmp_path / "model.gguf", "llama", METADATA, TENSORS, shards=2)
    found = sorted(tmp_path.glob("*.gguf"))
    assert [p.name for p in found] == ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]
    return found


def test_split(parts, sound):
    file, whole = open_gguf(parts[0]), open_gguf(sound)
    assert file.tensors.keys() == whole.tensors.keys()
    assert {t.file for t in file.tensors.values()} == set(parts)
    for name, tensor in file.tensors.items():
        assert tensor.rows(0, 1).equal(whole.tensors[name].rows(0, 1))
    assert file.metadata["tokenizer.ggml.pre"] == "smollm"


def test_split_wrongly(parts):
    with pytest.raises(CheckpointError, match="give the first"):
        open_gguf(parts[1])
    second = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.*No such file"):
        open_gguf(parts[0])
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(CheckpointError, match="not part 2 of 2"):
        open_gguf(parts[0])
    parts[1].write_bytes(second)
    renamed = parts[0].rename(parts[0].with_name("model.gguf"))
    with pytest.raises(CheckpointError, match="give the first"):
        open_gguf(renamed)


def test_split_with_a_tensor_twice_or_missing(parts):
    second = parts[1].read_bytes()
    parts[1].write_bytes(second.replace(b"blocks.weight", b"floats.weight"))
    with pytest.raises(CheckpointError, match=r"00002\.gguf: floats\.weight is in an earlier part"):
        open_gguf(parts[0])
    parts[1].write_bytes(second)
    first, stated = parts[0].read_bytes(), text(b"split.tensors.count") + struct.pack("<I", 5)
    assert first.count(stated + struct.pack("<I", len(TENSORS))) == 1
    parts[0].write_bytes(first.replace(stated + struct.pack("<I", len(TENSORS)), stated + struct.pack("<I", 7)))
    with pytest.raises(CheckpointError, match="states 7 tensors in all parts; they hold 4"):
        open_gguf(parts[0])
