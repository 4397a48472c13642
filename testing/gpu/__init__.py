"""Servers on a GPU, models of real head sizes, and the comparison of what they answer with stock SGLang."""
