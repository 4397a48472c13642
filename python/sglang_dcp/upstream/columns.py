"""Control columns that ride on SGLang's per-step all-gather, appended to its own."""

NUM_COLUMNS = 8
WORDS, NUM_ROWS, ROWS_CHECKSUM, FREE_PAGES, GUEST_PAGES, KV_TOKENS, HOME_REQUESTS, STEP = range(NUM_COLUMNS)
