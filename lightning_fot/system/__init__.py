"""What a process shares with its machine: files written whole, signals, ranks, progress, versions."""
