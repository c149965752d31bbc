"""YAML holds plain values: nothing in it grows, and no nesting is without end."""

from __future__ import annotations

import math
import time

import pytest
import yaml

from motionmerge.errors import ConfigError
from motionmerge.text import MAX_YAML, parse_yaml, write_yaml

LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {k0: 0}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}], k{i}: 0}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "what"),
    {
        LAUGHS: "anchors in line 1",
        MERGES: "anchors in line 1",
        "a: {<<: {b: 1}, c: 2}": "merge keys in line 1",
        "b: 1\n<<: {a: 1}": "merge keys in line 2",
        "a: *nowhere": "anchors",
        "!!merge x: {a: 1}": "tags",
        "%TAG ! tag:yaml.org,2002:\n---\n!merge x: {a: 1}": "tags",
        "a: !!python/name:os.system": "tags",
        "[" * 100_000: "50 levels",
        "{a: " * 100_000: "50 levels",
        "- " * 10_000: "50 levels",
        "x" * (MAX_YAML + 1): "characters",
    }.items(),
    ids=range(12),
)
def test_what_could_grow_is_refused_while_it_is_scanned(text, what):
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match=what) as caught:
        parse_yaml(text, source="The file")
    assert caught.value.fix
    assert time.perf_counter() - begin < 5


def test_a_quoted_key_of_two_angles_is_a_plain_key():
    assert parse_yaml('{"<<": 1, b: [1, {c: 2}]}', source="x") == {"<<": 1, "b": [1, {"c": 2}]}


def test_numbers_are_read_as_people_mean_them_and_text_stays_text():
    values = {"1e3": 1000.0, "1e-4": 1e-4, ".5": 0.5, "-3": -3, "1_000": 1000, "-.inf": -math.inf}
    values |= dict.fromkeys(["010", "1:30", "0x10", "1e", "1.2.3", "_1"])  # text, and no number
    for text, number in values.items():
        read = parse_yaml(f"a: {text}", source="x")["a"]
        assert read == (text if number is None else number) and type(read) in (str, int, float)
        for value in (text, read):
            assert parse_yaml(write_yaml({"a": value}), source="x") == {"a": value}
            assert yaml.safe_load(write_yaml([value], is_one_line=True)) == [value]
