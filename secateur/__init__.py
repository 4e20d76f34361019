"""Secateur: a pruning compiler for language models."""
