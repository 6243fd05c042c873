from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from latbench.cli import values
from latbench.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("4ms", 0.004),
        ("350us", 350e-6),
        ("350µs", 350e-6),  # micro sign
        ("350μs", 350e-6),  # Greek mu
        ("80ns", 80e-9),
        ("2.5s", 2.5),
        (".5s", 0.5),
        (" 10 min ", 600.0),
        ("1h", 3600.0),
        ("1h30min", 5400.0),
        ("1h 30min 10s", 5410.0),
        ("0s", 0.0),
    ],
)
def test_durations_are_seconds(text: str, seconds: float) -> None:
    assert values.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "4", "ms", "4 m", "-4ms", "4ms!", "1e3s", "30min1h", "1s1s", "4mss", "٤ms", "4ms, 5ms", "9" * 60 + "s"]
)
def test_malformed_durations_are_one_line_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match=r"write .*10min") as caught:
        values.parse_duration(text)
    assert "\n" not in str(caught.value)


def test_a_number_without_unit_is_told_so() -> None:
    with pytest.raises(UsageError, match="has no unit"):
        values.parse_duration("4")


def test_latencies_are_exact_milliseconds_above_zero() -> None:
    assert values.parse_latency("35us") == 0.035  # 35 * 1e-6 * 1e3 would not be
    assert values.parse_latency("1.2s") == 1200.0
    with pytest.raises(UsageError, match="above zero"):
        values.parse_latency("0ms")


@pytest.mark.parametrize(("text", "share"), [("2%", 0.02), ("0.02", 0.02), ("2.5 %", 0.025), ("100%", 1.0), ("0", 0.0)])
def test_percentages_are_shares(text: str, share: float) -> None:
    assert values.parse_percent(text) == share


def test_a_bare_number_above_one_asks_for_the_percent_sign() -> None:
    with pytest.raises(UsageError, match=r"did you mean 2%\?"):
        values.parse_percent("2")


@pytest.mark.parametrize(
    ("text", "name", "dims"),
    [
        ("input:1x3x224x224", "input", (1, 3, 224, 224)),
        ("1x3x224x224", None, (1, 3, 224, 224)),
        ("input:0:16x3", "input:0", (16, 3)),  # names from TensorFlow hold colons
        ("7", None, (7,)),
    ],
)
def test_shapes(text: str, name: str | None, dims: tuple[int, ...]) -> None:
    assert values.parse_shape(text) == (name, dims)


@pytest.mark.parametrize("text", ["", "x", "1x", "0x3", "1x-3", "input:", "1 x 3", "1,3,224"])
def test_malformed_shapes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="1x3x224x224"):
        values.parse_shape(text)


def test_dtypes_have_two_spellings() -> None:
    assert values.parse_dtype("fp32") == values.parse_dtype("float32") == "float32"
    assert values.parse_dtype("FP16") == values.parse_dtype("float16") == "float16"
    with pytest.raises(UsageError, match="fp32 or fp16"):
        values.parse_dtype("int8")


PARSERS = (values.parse_duration, values.parse_latency, values.parse_percent, values.parse_shape, values.parse_dtype)


@pytest.mark.parametrize("parse", PARSERS)
@given(text=st.text() | st.text("0123456789.nuµsmih %x:-"))
def test_no_text_makes_anything_but_a_usage_error(parse: Callable[[str], object], text: str) -> None:
    with contextlib.suppress(UsageError):
        parse(text)


@given(st.floats(1e-5, 1e8))
def test_parsing_inverts_formatting_to_three_digits(latency_ms: float) -> None:
    assert math.isclose(values.parse_latency(values.format_ms(latency_ms)), latency_ms, rel_tol=0.0051)


@given(st.floats(1e-6, 1e6))
def test_latencies_print_three_digits_in_a_fitting_unit(latency_ms: float) -> None:
    number, unit = values.format_ms(latency_ms).split()
    if unit != "s" and not (unit == "ns" and float(number) < 1):
        assert 1 <= float(number) < 1000
        assert len(number.replace(".", "")) == 3


@pytest.mark.parametrize(
    ("latency_ms", "text"),
    [
        (4.2149, "4.21 ms"),
        (0.035, "35.0 µs"),
        (1200.0, "1.20 s"),
        (0.00035, "350 ns"),
        (0.9997, "1.00 ms"),  # carried into the next unit
        (9.996, "10.0 ms"),
        (-0.002, "-2.00 µs"),  # a stub's difference may be negative
        (0.0, "0 ms"),
        (math.nan, "-"),
        (math.inf, "-"),
    ],
)
def test_latencies_as_text(latency_ms: float, text: str) -> None:
    assert values.format_ms(latency_ms) == text


def test_an_interval_is_printed_as_a_percentage() -> None:
    assert values.format_ms(4.21, 0.008) == "4.21 ms ± 0.8 %"
    assert values.format_ms(4.21, 0.12) == "4.21 ms ± 12 %"
    assert values.format_ms(4.21, 0.0004) == "4.21 ms ± 0.04 %"
    assert values.format_ms(4.21, math.nan) == "4.21 ms"


def test_bytes_and_counts() -> None:
    assert [values.format_bytes(n) for n in (0, 1023, 1024, 1536, 2**20 - 1, 2**30)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.50 KiB",
        "1.00 MiB",
        "1.00 GiB",
    ]
    assert [values.format_count(n) for n in (950, 1000, 1_200_000, 999_999, 569_000_000)] == [
        "950",
        "1.00 k",
        "1.20 M",
        "1.00 M",
        "569 M",
    ]


def test_options_parse_text_and_pass_defaults_through() -> None:
    @click.command()
    @click.option("--budget", type=values.DURATION, default=1.5)
    @click.option("--target", type=values.LATENCY)
    @click.option("--ci", type=values.PERCENT, default="2%")
    @click.option("--shape", type=values.SHAPE, multiple=True)
    @click.option("--dtype", type=values.DTYPE, default="fp32")
    def command(**options: object) -> None:
        click.echo(repr(options))

    runner = CliRunner()
    out = runner.invoke(command, ["--target", "4ms", "--shape", "a:1x3", "--shape", "b:2"]).output
    assert eval(out, {"InputShape": values.InputShape}) == {
        "budget": 1.5,
        "target": 4.0,
        "ci": 0.02,
        "shape": (("a", (1, 3)), ("b", (2,))),
        "dtype": "float32",
    }
    refused = runner.invoke(command, ["--budget", "soon"])
    assert refused.exit_code != 0
    assert "'soon' is no duration: write 10min" in refused.output
