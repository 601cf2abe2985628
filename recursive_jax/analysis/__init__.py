"""Decoding speed explained: parts timed alone, and recorded runs replayed."""
