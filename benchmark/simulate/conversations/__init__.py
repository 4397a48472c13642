"""What a cache of prompts is worth for conversations: hit share and prefill work, by who may keep what where."""
