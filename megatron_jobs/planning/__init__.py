"""What a run costs before it starts: operations, memory, speed, and the layouts that can be. Needs no torch."""
