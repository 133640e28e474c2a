"""Models of every kind, each prepared in one line, trained for some steps, evaluated and converted. See README.md."""
