"""What a method says: algorithms, clients, networks, parameters."""
