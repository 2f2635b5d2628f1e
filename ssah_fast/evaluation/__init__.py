"""Measures what a model does: answers and their judges, perplexity, tasks, and intervals for every figure."""
