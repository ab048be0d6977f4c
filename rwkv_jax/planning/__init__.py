"""What a run needs in memory, traffic and time, estimated without its hardware."""
