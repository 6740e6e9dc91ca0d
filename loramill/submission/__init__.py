"""From a request to a job's spec: options, defaults, and files of many jobs."""
