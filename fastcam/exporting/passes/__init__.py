"""Rewrites of a graph, one file per pass; `simplify` runs them in order.

In: a `Graph`. Out: the same graph, changed in place, computing the same values. Imports `graph`, `errors` and `ops`.
"""
