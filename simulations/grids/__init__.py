"""Where simulated clients run: in this process, or on Ray's workers."""
