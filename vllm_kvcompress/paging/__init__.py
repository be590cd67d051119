"""Scheduler side: which blocks a request holds, and when it is compacted."""
