"""Worker side: observes queries, runs Jobs, and keeps what attention needs of compacted requests."""
