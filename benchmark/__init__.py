"""Measurements and simulations; nothing here is imported by the served system."""
