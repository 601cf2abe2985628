"""How weights are named, tied and stored."""
