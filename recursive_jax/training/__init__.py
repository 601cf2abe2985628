"""One optimiser step: data, losses, optimizer, step."""
