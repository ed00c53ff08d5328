"""How a run is computed."""
