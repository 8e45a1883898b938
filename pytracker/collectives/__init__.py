"""How processes talk beside the training: gloo groups of our own, in levels, and who is missing from them."""

from __future__ import annotations

from .groups import MAX, SUM, HostGroup
from .levels import Announcement, Levels, Reduction
from .missing_ranks import in_few_words
from .ranks import MEETING, RESCUE, Ranks, all_done, by_value, group_named, has_others, is_first_rank

__all__ = [
    "MAX",
    "MEETING",
    "RESCUE",
    "SUM",
    "Announcement",
    "HostGroup",
    "Levels",
    "Ranks",
    "Reduction",
    "all_done",
    "by_value",
    "group_named",
    "has_others",
    "in_few_words",
    "is_first_rank",
]
