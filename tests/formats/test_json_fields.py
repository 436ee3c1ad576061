"""JSON of unknown origin: a field of a wrong type is one WeightsError that names the file, the field and the value."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_sd3.formats import bounded, json_fields
from functional_sd3.formats.errors import WeightsError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**400), 10**400) | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_every_reader_of_a_field_returns_its_type_or_raises_a_weights_error(value):
    fields = json_fields.Object({"x": value}, "file")
    readers = {
        "text": str, "boolean": bool, "integer": int, "number": (int, float), "mapping": json_fields.Object,
        "mappings": list, "texts": list, "items": list,
    }  # fmt: skip
    for reader, kind in readers.items():
        try:
            assert isinstance(getattr(fields, reader)("x"), kind)
        except WeightsError as error:
            assert str(error).startswith("file: ")
            assert len(str(error)) < 300


def test_a_field_is_read_or_named_in_the_error():
    fields = json_fields.parse_object('{"count": 1e3, "name": "a", "flag": true, "layers": [{"size": "5"}]}', "c.json")
    assert fields.integer("count") == 1000 and type(fields.integer("count")) is int
    assert fields.text("name") == "a" and fields.boolean("flag") is True
    assert fields.integer("absent", None) is None and fields.text("absent", "b") == "b"
    with pytest.raises(WeightsError, match=r"c.json: layers\[0\]: size is '5', not a number"):
        fields.mappings("layers")[0].integer("size")
    with pytest.raises(WeightsError, match="c.json: count is 1000.0: it must be a whole number from 0 to 9"):
        fields.integer("count", low=0, high=9)
    with pytest.raises(WeightsError, match="c.json: has no width, which must be a number"):
        fields.integer("width")
    with pytest.raises(WeightsError, match="flag is True, not a number"):
        fields.integer("flag")
    with pytest.raises(WeightsError, match=r"layers\[0\] is .* not a text"):
        fields.texts("layers")


@pytest.mark.parametrize(
    "text, reason",
    [
        ('{"a": 1, "a": 2}', "'a' is named twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ("[" * 100_000, "nested more than"),
        ("[" * 65 + "]" * 65, "nested more than"),
        ('{"a"', "delimiter"),
        ("[]", "not a JSON object"),
    ],
)
def test_what_is_no_json_of_an_object_is_refused(text, reason):
    with pytest.raises(WeightsError, match=reason):
        json_fields.parse_object(text, "c.json")


def test_nesting_up_to_the_limit_is_read():
    value = json_fields.parse("[" * 64 + "]" * 64, "c.json")
    assert value and isinstance(value, list)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, encoding):
    path = tmp_path / "c.json"
    path.write_bytes(json.dumps({"a": "ü"}, ensure_ascii=False).encode(encoding))
    assert json_fields.read(path).text("a") == "ü"
    assert bounded.read_text(path, 1000).startswith("{")


def test_other_encodings_are_refused_by_name(tmp_path):
    path = tmp_path / "c.txt"
    path.write_bytes("Käfer".encode("latin-1"))
    with pytest.raises(WeightsError, match=r"c.txt: is no text in UTF-8: byte 1 \(0xe4\)"):
        bounded.read_text(path, 100)
    path.write_bytes("Käfer".encode("utf-16-le"))
    with pytest.raises(WeightsError, match="byte order mark"):
        bounded.read_text(path, 100)
