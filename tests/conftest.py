"""Settings for every test."""

from __future__ import annotations

import os

from hypothesis import settings

# Machines that run the suite are shared, so no example has a deadline. CI draws the same examples each time.
settings.register_profile("shared", deadline=None)
settings.register_profile("ci", parent=settings.get_profile("shared"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "shared")
