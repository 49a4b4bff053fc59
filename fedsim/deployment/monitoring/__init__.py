"""What is told of runs and of a site's instructions to a Prometheus server."""
