"""Discrete-event simulator that drives the served system's own policy code on real or rebuilt workloads.

workloads.py and traces.py make requests, cluster.py holds the instances, engine.py runs the steps, results.py sums up,
rate_search.py finds the highest rate under a limit, experiments.py and figures.py build every published number.
"""
