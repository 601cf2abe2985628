"""Measurements of a model: its perplexity, and what a conversion preserved."""
