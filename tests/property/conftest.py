"""Hypothesis profiles. ``ci``, the default, draws the same examples every time; ``search`` draws new ones, and more:
``pytest tests/property --hypothesis-profile=search``."""

from hypothesis import HealthCheck, settings

# Examples are whole tensors, so time is bounded by their number, not by a deadline an idle machine would set.
_common = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}

settings.register_profile("ci", derandomize=True, max_examples=60, database=None, **_common)
settings.register_profile("search", max_examples=1000, **_common)

if settings.get_current_profile_name() not in ("ci", "search"):
    settings.load_profile("ci")
