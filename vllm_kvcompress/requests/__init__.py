"""What is known of a request on a worker: its table, its run arrays, what is kept of its queries."""
