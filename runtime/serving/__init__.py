"""Adapters to servers that are not ours."""
