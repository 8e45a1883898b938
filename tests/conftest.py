"""Settings for every test."""

from __future__ import annotations

import os

from hypothesis import settings

# Machines that run the suite are shared, so no example has a deadline. CI draws the same examples each time. To look
# for more: pytest -m hypothesis --hypothesis-profile thorough
settings.register_profile("shared", deadline=None)
settings.register_profile("ci", parent=settings.get_profile("shared"), derandomize=True)
settings.register_profile("thorough", parent=settings.get_profile("shared"), max_examples=2000)
settings.load_profile("ci" if os.environ.get("CI") else "shared")
