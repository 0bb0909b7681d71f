"""Reports from a run's files: one HTML page, tables for the terminal."""
