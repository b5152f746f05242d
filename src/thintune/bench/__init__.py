"""Benchmarks whose every row runs in a fresh process."""
