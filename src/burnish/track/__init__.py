"""Metrics, log, progress, sinks, signals: what a run says while it goes, without torch."""
