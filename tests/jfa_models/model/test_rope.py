"""Frequencies of RoPE, with and without scaling."""

import dataclasses
import math

import pytest

from jfa_models.model.rope import LinearScaling, ListedScaling, Llama3Scaling, LongRopeScaling, RopeConfig, YarnScaling

SCALED = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context_length=64)


def test_llama3_scaling_is_the_published_rule():
    def published(frequency):
        wavelength = 2 * math.pi / frequency
        if wavelength < 64 / 4.0:
            return frequency
        if wavelength > 64 / 1.0:
            return frequency / 8.0
        smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
        return (1 - smooth) * frequency / 8.0 + smooth * frequency

    plain = [500_000.0 ** -(2 * i / 64) for i in range(32)]
    got = RopeConfig(theta=500_000.0, scaling=SCALED).inverse_frequencies(64, 512)
    assert got == pytest.approx([published(f) for f in plain], rel=1e-12)


def test_linear_and_listed_scaling_divide():
    plain = RopeConfig(theta=1e4).inverse_frequencies(8, 512)
    halved = RopeConfig(theta=1e4, scaling=LinearScaling(factor=2)).inverse_frequencies(8, 512)
    assert halved == tuple(f / 2 for f in plain)
    listed = RopeConfig(theta=1e4, scaling=ListedScaling(values=(1.0, 2.0, 4.0, 8.0)))
    assert listed.inverse_frequencies(8, 512) == tuple(f / n for f, n in zip(plain, (1, 2, 4, 8), strict=True))


def test_yarn_is_the_published_rule():
    scaling = YarnScaling(factor=4.0, original_context_length=64)
    rope = RopeConfig(theta=100.0, scaling=scaling)
    plain = [100.0 ** -(i / 8) for i in range(8)]
    turns = [64 * f / (2 * math.pi) for f in plain]
    got = rope.inverse_frequencies(16, 512)
    # no pair rotates 32 times in 64 positions, so the ramp begins at the first pair; it ends where one rotates once
    last = math.ceil(8 * math.log(64 / (2 * math.pi)) / math.log(100))
    assert turns[last - 1] > 1 > turns[last]
    slow = [min(1.0, i / last) for i in range(8)]
    assert got == pytest.approx([f * (1 - s + s / 4) for f, s in zip(plain, slow, strict=True)], rel=1e-12)
    assert rope.attention_factor == 0.1 * math.log(4) + 1
    assert RopeConfig(theta=1.0, scaling=dataclasses.replace(scaling, attention_factor=0.5)).attention_factor == 0.5
    assert RopeConfig(theta=1.0, scaling=dataclasses.replace(scaling, factor=0.5)).attention_factor == 1.0


def test_the_context_length_selects_the_factors_of_longrope():
    scaling = LongRopeScaling(short=(1.0, 2.0), long=(4.0, 8.0), original_context_length=64, attention_factor=1.25)
    rope, (fast, slow) = RopeConfig(theta=9.0, scaling=scaling), RopeConfig(theta=9.0).inverse_frequencies(4, 64)
    assert rope.inverse_frequencies(4, 64) == (fast, slow / 2)
    assert rope.inverse_frequencies(4, 65) == (fast / 4, slow / 8)
    assert rope.attention_factor == 1.25


def test_a_part_of_a_head_is_rotated():
    part = RopeConfig(theta=1e4, rotary_dim=8)
    assert part.inverse_frequencies(20, 64) == RopeConfig(theta=1e4).inverse_frequencies(8, 64)


REFUSED = {  # name: (rope of a head of 16, message)
    "odd_part": (RopeConfig(theta=1e4, rotary_dim=7), "rotary_dim must be even, because rope rotates pairs of"),
    "large_part": (RopeConfig(theta=1e4, rotary_dim=18), r"rotary_dim must be 2 to head_dim \(16\), got 18"),
    "listed": (
        RopeConfig(theta=1e4, scaling=ListedScaling(values=(1.0,))),
        "rope scaling must list a divisor for each of 8 pairs, got 1",
    ),
    "long": (
        RopeConfig(
            theta=1e4,
            scaling=LongRopeScaling(short=(1.0,), long=(1.0,), original_context_length=64, attention_factor=1.0),
        ),
        "rope scaling must list a divisor for each of 8 pairs, got 1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_rope_that_does_not_fit_its_heads_is_refused(name):
    rope, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        rope.check(16)


def test_invalid_rope_parameters_are_refused():
    with pytest.raises(ValueError, match=r"lists for short and long contexts must have the same length, got 1 and 2"):
        LongRopeScaling(short=(1.0,), long=(1.0, 2.0), original_context_length=64, attention_factor=1.0)
    with pytest.raises(ValueError, match="rope: theta must be a finite number > 0, got -1"):
        RopeConfig(theta=-1.0)
    with pytest.raises(ValueError, match="rope scaling: factor must be a finite number > 0, got 'x'"):
        LinearScaling(factor="x")
    with pytest.raises(ValueError, match=r"high_freq_factor must be larger than low_freq_factor, got 1.0 and 4.0"):
        dataclasses.replace(SCALED, low_freq_factor=4.0, high_freq_factor=1.0)
    with pytest.raises(ValueError, match=r"smallest_divisor must be a finite number > 0, got 0.0"):
        ListedScaling(values=(1.0, 0.0))
