"""What a person sees. The jobs print through this package only."""
