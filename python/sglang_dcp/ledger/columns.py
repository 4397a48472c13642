"""Control columns of an instance in a step: what every instance tells all others, whether or not it has messages."""

from __future__ import annotations

NUM_COLUMNS = 9
WORDS, DECISIONS, ROWS_CHECKSUM, FREE_PAGES, GUEST_PAGES, KV_TOKENS, HOME_REQUESTS, WANTED_PAGES, STEP = range(NUM_COLUMNS)
"""DECISIONS: digest of what the ledger has decided up to the step before, the same on all instances. GUEST_PAGES and KV_TOKENS leave out
what retained sequences hold. WANTED_PAGES: free pages that the instance needs for itself, where it can get them of retained ones."""
