"""Tables and plots. Nothing here imports torch."""
