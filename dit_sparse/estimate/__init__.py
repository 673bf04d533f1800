"""Estimates of attention mass per block pair, and what follows from them: cluster orders and budgets per head.

scores: from pooled tokens. row_scores: from exactly computed rows. clusters: k-means. budget: from a quality target
to a number of blocks. row_outputs: how the output of some rows errs at every such number. sinks: blocks that are kept
whatever their score.
"""
