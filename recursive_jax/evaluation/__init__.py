"""What a model is worth: perplexity, and what a conversion preserved."""
