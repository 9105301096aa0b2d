"""Rewrites of a graph, one file each; `simplify` runs them in order.

In: a `Graph`. Out: the same graph, changed in place, computing the same values. Imports `graph`, `errors` and `ops`.
"""
