"""Recorded conversations on real servers: how much of their prompts a server need not compute, against what the simulator says."""
