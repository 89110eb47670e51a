"""Where clicks come from when no shop of one's own is at hand: files, a public data set, invented ones."""
