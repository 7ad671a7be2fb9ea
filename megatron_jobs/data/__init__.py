"""Which token trains at which step: phases, the order of the data, and the feeder of micro-batches. Needs no torch."""
