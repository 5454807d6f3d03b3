import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamm.config import Schedule
from megamm.core.errors import ConfigError
from megamm.train.schedule import lr_factor


@given(st.sampled_from(["cosine", "wsd", "constant"]), st.integers(0, 20), st.integers(0, 20), st.floats(0, 1), st.integers(40, 200))
def test_factor_warms_up_stays_within_bounds_and_never_rises_after(kind, warmup, decay, low, steps):
    factor = lr_factor(Schedule(kind=kind, warmup_steps=warmup, decay_steps=decay, min_ratio=low), steps)
    values = [factor(step) for step in range(steps + 1)]
    assert all(0 < value <= 1 for value in values[:warmup]) and values[:warmup] == sorted(values[:warmup])
    after = values[warmup:]
    assert after == sorted(after, reverse=True)
    assert min(after) >= low - 1e-12


def test_ends_are_exact():
    cosine = lr_factor(Schedule(kind="cosine", warmup_steps=10, min_ratio=0.1), 110)
    assert cosine(0) == 0.1 and cosine(9) == 1.0 and cosine(10) == 1.0
    assert cosine(60) == pytest.approx(0.55) and cosine(110) == pytest.approx(0.1)
    wsd = lr_factor(Schedule(kind="wsd", warmup_steps=5, decay_steps=10, min_ratio=0.0), 100)
    assert wsd(89) == 1.0 and wsd(95) == pytest.approx(0.5) and wsd(100) == 0.0


def test_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match=r"warmup_steps=20 .* train.steps=10"):
        lr_factor(Schedule(warmup_steps=20), 10)
