"""What a cache of prompts is worth: turns of conversations that come and go, by the router's and the ledger's own rules."""
