"""Submission of jobs: options, files of many jobs, defaults, checks, and the entry in the queue."""
