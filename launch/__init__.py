"""Command line, planning, Ray adapters and monitoring: where things run, never what they compute."""
