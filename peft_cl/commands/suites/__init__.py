"""Suites: a matrix of runs of `peft-cl train`, and the tables that come of it."""
