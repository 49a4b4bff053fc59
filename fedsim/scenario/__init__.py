"""A scenario: one TOML file, read, checked, named and hashed."""
