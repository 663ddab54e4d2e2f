"""Headers against the safetensors library, in both directions; then one header for each way of being wrong."""

import json
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save_file

from streamquant.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, build_header, header_length, parse_header, parse_object
from streamquant.errors import CheckpointError

U8_PAIR = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}

TORCH_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def parse_file(content: bytes):
    """What a reader of a whole file does."""
    length = header_length(content[:8], file="a.safetensors", file_bytes=len(content))
    return parse_header(content[8 : 8 + length], file="a.safetensors", file_bytes=len(content))


def file_of(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of any header, right or wrong; bytes are taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def refusal(content: bytes) -> str:
    """The message with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        parse_file(content)
    message = str(caught.value)
    assert message.startswith("a.safetensors")
    assert message.isprintable()  # one line
    assert len(message) < 2000
    return message


# --- what the library writes, we read --------------------------------------------------------------------------------


def test_files_of_the_library_are_read_as_it_reads_them(tmp_path):
    tensors = {f"{name}.weight": torch.arange(12).reshape(3, 4).to(dtype) for dtype, name in TORCH_NAMES.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 7), "Größe.重み": torch.ones(2, 1, 3)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "ü"})
    content = path.read_bytes()
    specs = {spec.name: spec for spec in parse_file(content)}
    with safe_open(path, framework="pt") as reader:
        theirs = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118, it is no mapping
        assert {name: (spec.dtype, list(spec.shape)) for name, spec in specs.items()} == {
            name: (piece.get_dtype(), piece.get_shape()) for name, piece in theirs.items()
        }
    assert all(specs[f"{name}.weight"].dtype == name for name in TORCH_NAMES.values())
    for name, tensor in tensors.items():
        spec = specs[name]
        assert spec.num_elements == tensor.numel()
        assert content[spec.start : spec.end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), name


# --- what we write, the library reads --------------------------------------------------------------------------------


@st.composite
def tensors_in_order(draw):
    """(name, dtype, shape) of files such as we could write, in any order of widths."""
    names = st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=12).filter(
        lambda name: name != "__metadata__"
    )
    shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
    entries = []
    for name in draw(st.lists(names, unique=True, max_size=8)):
        dtype, shape = draw(st.sampled_from(sorted(DTYPE_BITS))), draw(shapes)
        entries.append((name, dtype, (*shape, 8) if DTYPE_BITS[dtype] < 8 else shape))  # whole bytes
    return entries


@settings(deadline=None)
@given(tensors=tensors_in_order())
def test_a_built_header_has_no_gap_and_the_library_reads_it(tensors, tmp_path_factory):
    header, specs = build_header(tensors, file="a.safetensors")
    assert [(spec.name, spec.dtype, spec.shape) for spec in specs] == tensors
    assert len(header) % 8 == 0
    ends = [len(header), *(spec.end for spec in specs)]
    assert [spec.start for spec in specs] == ends[:-1]

    content = header + bytes(index % 251 for index in range(ends[-1] - len(header)))
    assert parse_file(content) == specs
    assert {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in deserialize(content)} == {
        spec.name: (spec.dtype, spec.shape, content[spec.start : spec.end]) for spec in specs
    }
    path = tmp_path_factory.getbasetemp() / "built.safetensors"
    path.write_bytes(content)
    with safe_open(path, framework="pt") as reader:
        assert reader.metadata() == {"format": "pt"}
        assert set(reader.keys()) == {name for name, _, _ in tensors}


# --- files that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 7])
def test_a_file_shorter_than_a_length_is_refused(kept):
    assert f"{kept} bytes are too few" in refusal(file_of({})[:kept])


@pytest.mark.parametrize("claimed", [2**63, 2**64 - 1, 1 << 40, 3])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(claimed):
    assert f"claims {claimed} bytes in a file of 10" in refusal(claimed.to_bytes(8, "little") + b"{}")


def test_a_header_longer_than_the_format_allows_is_refused():
    prefix, file_bytes = (MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 10 * MAX_HEADER_BYTES
    with pytest.raises(CheckpointError, match=f"the format allows {MAX_HEADER_BYTES}"):
        header_length(prefix, file="a.safetensors", file_bytes=file_bytes)
    assert header_length(MAX_HEADER_BYTES.to_bytes(8, "little"), file="a.safetensors", file_bytes=file_bytes) == MAX_HEADER_BYTES


def test_a_file_cut_anywhere_is_refused(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    for end in range(len(content)):
        refusal(content[:end])
    assert "truncated" in refusal(content[:-1])
    assert f"overlong: its header describes {len(content)} bytes and the file has {len(content) + 1}" in refusal(content + b"\0")


@pytest.mark.parametrize(
    ("offsets", "fault"),
    [
        ({"a": [0, 2], "b": [1, 3]}, "b starts at byte .* overlaps"),
        ({"a": [0, 2], "b": [0, 2]}, "b starts at byte .* overlaps"),
        ({"a": [0, 2], "b": [3, 5]}, "b starts at byte .* leaves a hole"),
        ({"a": [1, 3], "b": [3, 5]}, "a starts at byte .* leaves a hole"),
        ({"a": [0, 2], "empty": [1, 1], "b": [2, 4]}, "b starts|empty starts"),
    ],
)
def test_tensors_that_do_not_tile_the_file_are_refused(offsets, fault):
    header = {name: {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]} for name, (start, end) in offsets.items()}
    content = file_of(header, bytes(max(end for _, end in offsets.values())))
    assert re.search(fault, refusal(content))
    with pytest.raises(SafetensorError):
        deserialize(content)


ENTRIES = {
    "an unknown dtype": ({"dtype": "F7"}, "unknown dtype 'F7'"),
    "a dtype that is no text": ({"dtype": 8}, "unknown dtype 8"),
    "a dtype that is a list": ({"dtype": ["U8"]}, "unknown dtype"),
    "a negative dimension": ({"shape": [-2]}, "none below 0"),
    "a fractional dimension": ({"shape": [2.0]}, "lists of integers"),
    "a boolean dimension": ({"shape": [True], "data_offsets": [0, 1]}, "lists of integers"),
    "a dimension in quotes": ({"shape": ["2"]}, "lists of integers"),
    "a dimension past 64 bits": ({"shape": [2**64], "data_offsets": [0, 2**64]}, "lists of integers"),
    "a shape that is no list": ({"shape": 2}, "lists of integers"),
    "a shape too long to multiply": ({"shape": [1] * 10_000, "data_offsets": [0, 1]}, "lists of integers"),
    "a shape of more bytes than there are": ({"shape": [2**31, 2**31]}, "a of U8"),
    "a shape whose bytes wrap round 64 bits": ({"shape": [2**32, 2**32, 2]}, "a of U8"),
    "a shape whose size fills pages": ({"shape": [2**63 - 1] * 64}, "a of U8"),
    "half a byte": ({"dtype": "F4", "shape": [3]}, "takes 1 bytes"),
    "offsets for another shape": ({"shape": [3]}, "takes 3 bytes"),
    "offsets in the wrong order": ({"data_offsets": [2, 0]}, "takes 2 bytes"),
    "one offset": ({"data_offsets": [2]}, "lists of integers"),
    "three offsets": ({"data_offsets": [0, 1, 2]}, "lists of integers"),
    "a negative offset": ({"data_offsets": [-2, 0]}, "none below 0"),
    "a field too many": ({"strides": [1]}, "exactly dtype, shape and data_offsets"),
    "no dtype": ({"dtype": None}, "unknown dtype None"),
}


@pytest.mark.parametrize(("changes", "fault"), ENTRIES.values(), ids=ENTRIES)
def test_an_entry_with_it_is_refused(changes, fault):
    assert fault in refusal(file_of({"a": U8_PAIR | changes}, b"12"))


@pytest.mark.parametrize("field", sorted(U8_PAIR))
def test_an_entry_without_a_field_is_refused(field):
    entry = {key: value for key, value in U8_PAIR.items() if key != field}
    assert "a must have exactly dtype, shape and data_offsets" in refusal(file_of({"a": entry}, b"12"))


@pytest.mark.parametrize("entry", [None, [], "U8", 2])
def test_an_entry_that_is_no_object_is_refused(entry):
    assert "a must have exactly" in refusal(file_of({"a": entry}))


@pytest.mark.parametrize("metadata", [None, [], "pt", {"format": 1}, {"format": None}, {"format": {}}])
def test_metadata_other_than_texts_is_refused(metadata):
    assert "__metadata__ must map strings to strings" in refusal(file_of({"__metadata__": metadata, "a": U8_PAIR}, b"12"))


ENTRY = json.dumps(U8_PAIR).encode()
TEXTS = {
    "nothing": (b"", "valid JSON"),
    "no JSON": (b"hello", "valid JSON"),
    "half an object": (b'{"a":', "valid JSON"),
    "NULs behind the object": (b'{"a":' + ENTRY + b"}\0\0", "valid JSON"),
    "a list": (b"[]", "does not hold a JSON object"),
    "a name twice": (b'{"a":' + ENTRY + b',"a":' + ENTRY + b"}", "'a' appears twice"),
    "a field twice": (b'{"a":' + ENTRY[:-1] + b', "dtype":"I8"}}', "'dtype' appears twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', "'__metadata__' appears twice"),
    "bad UTF-8": (b'{"\xff":' + ENTRY + b"}", "valid JSON"),
    "half of a surrogate pair": (b'{"\xed\xa0\x80":' + ENTRY + b"}", "valid JSON"),
    "half of an escaped surrogate pair": (b'{"\\ud83d":' + ENTRY + b"}", "valid JSON"),
    "a byte order mark": (b"\xef\xbb\xbf" + b'{"a":' + ENTRY + b"}", "valid JSON"),
    "UTF-16": (json.dumps({"a": U8_PAIR}).encode("utf-16"), "valid JSON"),
    "UTF-16 without a mark": (json.dumps({"a": U8_PAIR}).encode("utf-16-le"), "valid JSON"),
    "a raw line feed in a name": (b'{"a\n":' + ENTRY + b"}", "valid JSON"),
    "an integer of 5000 digits": (b'{"a":{"dtype":"U8","shape":[' + b"1" * 5000 + b'],"data_offsets":[0,2]}}', "valid JSON"),
    "100 000 objects in each other": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nests too deeply"),
    "100 000 open lists": (b"[" * 100_000, "nests too deeply"),
}


@pytest.mark.parametrize(("text", "fault"), TEXTS.values(), ids=TEXTS)
def test_a_header_of_it_is_refused(text, fault):
    assert fault in refusal(file_of(text, b"12"))


def test_a_shape_that_wraps_round_64_bits_is_refused_though_it_ends_in_0():
    content = file_of({"a": {"dtype": "U8", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}})
    refusal(content)
    with pytest.raises(SafetensorError):
        deserialize(content)


NAMES = {"a line feed": "a\nb", "colors": "a\r\x1b[31m", "5000 letters": "a" * 5000, "right to left": "\N{RIGHT-TO-LEFT OVERRIDE}a"}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_message_is_one_short_line_though_a_name_holds(name):
    refusal(file_of({name: U8_PAIR | {"shape": [3]}}, b"12"))
    refusal(file_of({name: {}}))
    refusal(file_of({"a": U8_PAIR | {"dtype": name}}, b"12"))
    refusal(file_of(b'{"x":1,"x":2}'.replace(b"x", json.dumps(name)[1:-1].encode())))


@st.composite
def nearly_right_files(draw):
    """Files of a few tiny tensors, most of them in their place."""
    header, end = {}, 0
    for name in draw(st.lists(st.sampled_from("abc"), unique=True, max_size=3)):
        dtype, shape = draw(st.sampled_from(["U8", "BF16", "F4"])), draw(st.lists(st.integers(0, 3), max_size=2))
        begin, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
        right = st.just([begin, end])
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": draw(right | right | st.lists(st.integers(0, 8), min_size=2, max_size=2)),
        }
    return file_of(header, bytes(draw(st.just(end) | st.integers(0, 20))))


@settings(deadline=None)
@given(content=nearly_right_files())
def test_a_file_is_refused_exactly_where_the_library_refuses_it(content):
    try:
        deserialize(content)
    except SafetensorError:
        refusal(content)
    else:
        parse_file(content)


@settings(deadline=None)
@given(content=st.binary(max_size=64), length=st.integers(0, 64))
def test_any_bytes_are_refused_in_one_line_or_read_by_the_library_too(content, length):
    content = length.to_bytes(8, "little") + content
    try:
        parse_file(content)
    except CheckpointError:
        refusal(content)
    else:
        deserialize(content)


def test_an_object_is_read_with_all_its_kinds_of_values():
    value = {"a": [1, 2.5, None, True, {"ü": "\N{OCTOPUS}"}], "b": {"c": {}}}
    assert parse_object(json.dumps(value).encode(), file="config.json") == value
    assert parse_object(json.dumps(value, ensure_ascii=False).encode(), file="config.json") == value
