"""torch to format and back: what of a TrainState a rank stores (`plan`), how it comes back (`apply`)."""
