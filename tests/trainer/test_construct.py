"""One clear line for every way in which a section can be wrong."""

import math
from collections.abc import Callable
from typing import Literal

import pytest

from trainer.construct import call, construct
from trainer.errors import ConfigError


class Thing:
    def __init__(
        self,
        size: int,
        *,
        width: int,
        rate: float = 1.0,
        kind: Literal["a", "b"] | None = None,
        pair: tuple[float, float] = (0.0, 1.0),
        names: list[str] | None = None,
        build: Callable[[], int] | None = None,
    ) -> None:
        if width < 1:
            raise ValueError(f"width is {width}; allowed: 1 or more")
        self.size, self.width, self.rate, self.kind, self.pair = size, width, rate, kind, pair


def thing(*, width: int, rate: float = 1.0) -> tuple[int, float]:
    return width, rate


TARGET = f"{__name__}.Thing"


def test_partial_completes_later_and_names_its_section():
    partial = construct({"_target_": TARGET, "_partial_": True, "width": 3, "rate": 2}, "mixer.x")
    made = partial(5)
    assert (made.size, made.width, made.rate) == (5, 3, 2)
    broken = construct({"_target_": TARGET, "_partial_": True, "width": 0}, "mixer.x")
    with pytest.raises(ConfigError, match=r"^mixer.x.width is 0; allowed: 1 or more$"):
        broken(5)


def test_given_arguments_are_not_keys():
    assert call(thing, {"rate": 0.5}, "x", width=2) == (2, 0.5)
    with pytest.raises(ConfigError, match=r"^x.width=3: unknown key; allowed: rate$"):
        call(thing, {"width": 3}, "x", width=2)


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"width": "3"}, "x.width=3: allowed: int"),
        ({"width": True}, "x.width=True: allowed: int"),
        ({"width": 1.5}, "x.width=1.5: allowed: int"),
        ({"width": 1, "rate": "fast"}, "x.rate=fast: allowed: finite float"),
        ({"width": 1, "rate": math.inf}, "x.rate=inf: allowed: finite float"),
        ({"width": 1, "rate": math.nan}, "x.rate=nan: allowed: finite float"),
        ({"width": 2**63}, f"x.width={2**63}: allowed: int"),
        (None, "x=None: allowed: a section, whose keys are x.*"),
        ({"width": 1, "rate": False}, "x.rate=False: allowed: finite float"),
        ({"width": 1, "kind": "c"}, "x.kind=c: allowed: a, b or null"),
        ({"width": 1, "pair": [1]}, "x.pair=[1]: allowed: tuple of finite float, finite float"),
        ({"width": 1, "names": ["a", 2]}, "x.names=['a', 2]: allowed: list of str or null"),
        ({"width": 1, "names": "ab"}, "x.names=ab: allowed: list of str or null"),
        ({"widht": 1}, "x.widht=1: unknown key; allowed: build, kind, names, pair, rate, width"),
    ],
)
def test_wrong_values_are_named(section, line):
    with pytest.raises(ConfigError) as caught:
        construct(section and {"_target_": TARGET, "_partial_": True, **section}, "x")
    assert str(caught.value) == line


@pytest.mark.parametrize("value", [1, 1.5, None, "a"])
def test_right_values_pass(value):
    section = {"rate": value} if isinstance(value, int | float) else {"kind": value}
    construct({"_target_": TARGET, "_partial_": True, "width": 1, **section}, "x")


def test_missing_key_and_target():
    with pytest.raises(ConfigError, match=r"^x.width: missing; allowed: int$"):
        call(thing, {}, "x")
    with pytest.raises(ConfigError, match=r"^x._target_: missing"):
        construct({"width": 1}, "x")
    with pytest.raises(ConfigError, match=r"^x._target_: cannot import 'models.nothing.Here'"):
        construct({"_target_": "models.nothing.Here"}, "x")
