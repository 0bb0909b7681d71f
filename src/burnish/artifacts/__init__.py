"""Run folders, sealed folders, checkpoints: everything that is written to disk, without torch."""
