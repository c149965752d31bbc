"""Strangers' regular expressions find what Python's do, and none of them runs for ever."""

from __future__ import annotations

import random
import re
import threading
import time

import pytest

from motionmerge.errors import ConfigError, RecipeError
from motionmerge.merging.algebra.groups import selects
from motionmerge.patterns import MAX_TEXT, compile_pattern

PIECES = (
    *(
        "a",
        "b",
        ".",
        "[ab]",
        "[^a]",
        r"\d",
        r"\w",
        r"\W",
        r"\s",
        r"\.",
        "[a-c]",
        r"[\w-]",
        "[^\\d.]",
    ),
    *("(a|b)", "(ab|c)*", "(a*)*", "(?:a+|b)+", "(a|)", "()*", "x{2}", "a{1,3}", "b?", "a+?", ".*"),
    *("^", "$", r"\b", r"\B", r"\A", r"\Z", "(?!b)", "(?=a)", "(?<=a)", "(?<!ab)", "(?!.*c)"),
    *("(?i:A)", "(?s:.)"),
)

ENDLESS = (
    "(.*)*(.*)*(.*)*z",
    "(a+)+$z",
    "(a|a)*z",
    "(a|a|a)+(a|a|a)+z",
    "a*a*a*a*a*a*a*z",
    "(?=(.*)*z)*z",
    "(?!(.*)*(.*)*z)b",
    "(?<=a(?!(.*)*b))c",
    "(x{40}){40}",
    "(a{0,60}){0,60}z",
    "((((a{9}){9}){9}){9}){9}",
)


def test_a_pattern_finds_what_pythons_engine_finds():
    chance = random.Random(0)
    for _ in range(10_000):
        pattern = "".join(chance.choices(PIECES, k=chance.randint(1, 5)))
        pattern = chance.choice(["", "", "", "(?i)"]) + pattern
        text = "".join(chance.choices("abcx1. _A\n", k=chance.randint(0, 8)))
        expected = re.search(pattern, text) is not None
        assert compile_pattern(pattern)(text) is expected, (pattern, text)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_no_pattern_runs_for_long(pattern):
    begin = time.thread_time()
    try:
        found = compile_pattern(pattern)("a" * MAX_TEXT)
    except ConfigError as error:
        assert error.fix
    else:
        assert not found
    assert time.thread_time() - begin < 5  # unbounded: hours


def test_a_bound_holds_in_a_thread_as_well():
    found: list[bool] = []
    thread = threading.Thread(
        target=lambda: found.append(compile_pattern("(.*)*(.*)*y(.*)*z")("a" * 500))
    )
    thread.start()
    thread.join(timeout=5)
    assert found == [False]


@pytest.mark.parametrize(
    ("pattern", "what"),
    {
        r"(a)\1": "a backreference",
        "(a)(?(1)b|c)": "a conditional group",
        "(?m)^a": "a flag",
        "(?L:a)": "not a regular expression",
        "(": "not a regular expression",
        "(" * 900: "not a regular expression",
        "a" * 1001: "1001 characters",
    }.items(),
)
def test_what_cannot_be_bounded_is_refused_by_name(pattern, what):
    with pytest.raises(ConfigError, match=what) as caught:
        compile_pattern(pattern)
    assert caught.value.fix


def test_a_name_without_end_is_refused():
    with pytest.raises(ConfigError, match="1001 characters"):
        compile_pattern("a")("b" * 1001)


def test_layers_are_matched_by_pattern_as_quickly_as_adapter_files_need():
    names = [f"blocks.{i}.attn{k}.to_{q}" for i in range(40) for k in (1, 2) for q in "qkvo"]
    begin = time.thread_time()
    hits = sum(
        compile_pattern(rf"\A.*\.?{re.escape(name)}$")(f"model.{other}")
        for name in names
        for other in names
    )
    assert hits == len(names)
    assert time.thread_time() - begin < 20


def test_a_recipe_with_an_endless_pattern_is_answered():
    assert not selects("re:(.*)*(.*)*(.*)*z")("blocks.0.attn1.to_q.weight" * 10)
    with pytest.raises(RecipeError, match="backreference"):
        selects(r"re:(a)\1")
