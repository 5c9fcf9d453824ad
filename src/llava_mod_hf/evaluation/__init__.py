"""What a model knows, and how its experts are used."""
